// Attention on Ampere's instructions: cp.async, ldmatrix, mma.sync. A CTA takes a tile of queries of one request and
// K/V head through all keys that they see, 64 at a time: the stored ones in ascending order, then the nodes' own rows.
// Tiles of a request are neighbours in the grid, so that the context's keys and values come from memory for the first
// of them and from the L2 cache for the others. No wgmma or TMA: that they pay has to be measured first.
#include "draft_graph_attention.cuh"

namespace dllm::cuda {
namespace {

template <typename Float, int kDim>
struct Shared {
  alignas(16) Float queries[kQueries * kDim];
  Float keys[kPositions<Float> * kDim];
  Float values[kPositions<Float> * kDim];
  int64_t sources[kPositions<Float>];
  Plan plan;
};

// A CTA's place in the grid.
struct Work {
  QueryTile tile;
  int32_t kv_head;
  int32_t split;

  __device__ Interval rows(int32_t heads_per_kv) const {
    const int32_t first = tile.rows.begin + tile.first_query / heads_per_kv;
    const int32_t last = tile.rows.begin + (tile.first_query + kQueries - 1) / heads_per_kv;
    return intersect({first, last + 1}, tile.rows);
  }
};

// One of the tile's 64 queries.
struct Query {
  int32_t row;
  int32_t head;
  bool is_there;
};

__device__ inline Query query_at(const DraftGraphAttentionArgs& args, const Work& work, int32_t i) {
  const int32_t heads_per_kv = args.num_heads / args.num_kv_heads;
  const int32_t query = work.tile.first_query + i;
  const int32_t row = work.tile.rows.begin + query / heads_per_kv;
  return {row, work.kv_head * heads_per_kv + query % heads_per_kv, row < work.tile.rows.end};
}

// Hide from a query, `half` of the thread's two, the keys that it does not see.
template <int kPairs>
__device__ inline void hide(float (&scores)[kPairs][4], int half, const TileNode& node, int32_t row, KeyTile tile) {
  const Interval seen = {tile.begin, tile.begin + 8 * kPairs};
  if (!tile.is_own && (covers(node.context.interval[0], seen) || covers(node.context.interval[1], seen))) {
    return;
  }
  const int32_t first = tile.begin + threadIdx.x % 4 * 2;
  const int32_t num_seen = seen_rows(node.rows, node.is_causal != 0, row).end - node.rows.begin;
  const Interval slots = intersect(node.slots, {node.slots.begin, node.slots.begin + num_seen});
#pragma unroll
  for (int j = 0; j < 2 * kPairs; ++j) {
    const int32_t at = first + j / 2 * 8 + j % 2;
    const bool is_visible = tile.is_own ? contains(slots, at) : sees_stored(node.context, at);
    float& score = scores[j / 2][2 * half + j % 2];
    score = is_visible ? score : kNegativeInfinity;
  }
}

// Turn scores into weights relative to the row's new maximum, and what was summed so far with them.
template <int kPairs, int kOutPairs>
__device__ inline void weigh(float (&scores)[kPairs][4], float (&out)[kOutPairs][4], int half, float scale,
                             SoftmaxState<float>& state) {
  float max_score = kNegativeInfinity;
#pragma unroll
  for (int j = 0; j < 2 * kPairs; ++j) {
    max_score = fmaxf(max_score, scores[j / 2][2 * half + j % 2]);
  }
  max_score = fmaxf(max_score, __shfl_xor_sync(kAllLanes, max_score, 1));
  max_score = fmaxf(max_score, __shfl_xor_sync(kAllLanes, max_score, 2));
  const float factor = exp2f(raise_max(state, max_score * scale));
  const float base = softmax_base(state.max);
  state.sum *= factor;
#pragma unroll
  for (int j = 0; j < 2 * kPairs; ++j) {
    float& score = scores[j / 2][2 * half + j % 2];
    score = exp2f(score * scale - base);
    state.sum += score;
  }
#pragma unroll
  for (int j = 0; j < 2 * kOutPairs; ++j) {
    out[j / 2][2 * half + j % 2] *= factor;
  }
}

template <typename Float, int kDim>
__device__ inline void copy_queries(const DraftGraphAttentionArgs& args, const Work& work, Float* tile) {
  copy_rows<Float, kDim>(tile, kQueries, args.head_dim, [&](int i) -> const Float* {
    const Query query = query_at(args, work, i);
    const auto* all = static_cast<const Float*>(args.query);
    return query.is_there ? all + query.row * args.query_strides.row + query.head * args.query_strides.head : nullptr;
  });
  commit_copies();
}

template <typename Float, int kDim, bool is_value>
__device__ inline void copy_keys(const DraftGraphAttentionArgs& args, int32_t kv_head, KeyTile tile,
                                 const int64_t* sources, Float* to) {
  const RowStrides& strides = is_value ? args.value_strides : args.key_strides;
  const auto* rows = static_cast<const Float*>(is_value ? args.value : args.key) + kv_head * strides.head;
  const auto* stored = static_cast<const Float*>(args.kv_cache) + kv_head * args.cache_head_stride;
  stored += is_value ? args.head_dim : 0;
  copy_rows<Float, kDim>(to, kPositions<Float>, args.head_dim, [&](int i) -> const Float* {
    const int64_t source = sources[i];
    return source == kNowhere ? nullptr : tile.is_own ? rows + source * strides.row : stored + source;
  });
}

// Where a split leaves its sums: [num_splits, workspace_rows, num_heads], out of head_dim numbers, then max and sum.
struct Part {
  float* out;
  float* max_and_sum;
};

__device__ inline Part part_of(const DraftGraphAttentionArgs& args, int32_t split, int32_t row, Interval node_rows,
                               int32_t node, int32_t head) {
  const int64_t num_rows = workspace_rows(args);
  const int64_t place = num_rows == args.num_rows ? row : int64_t{node} * kSplitRows + row - node_rows.begin;
  const int64_t index = (split * num_rows + place) * args.num_heads + head;
  const int64_t num_parts = context_split(args).num * num_rows * args.num_heads;
  return {args.workspace + index * args.head_dim, args.workspace + num_parts * args.head_dim + 2 * index};
}

template <typename Float>
__device__ inline Float* out_of(const DraftGraphAttentionArgs& args, int32_t row, int32_t head) {
  return static_cast<Float*>(args.out) + row * args.out_strides.row + head * args.out_strides.head;
}

template <typename Float>
__device__ inline void store_pair(Float* to, float first, float second) {
  if constexpr (sizeof(Float) == 2) {
    *reinterpret_cast<uint32_t*>(to) = pack<Float>(first, second);
  } else {
    *reinterpret_cast<float2*>(to) = {first, second};
  }
}

// Write `half` of the thread's two queries: the result, or this split's part of it.
template <typename Float, int kPairs>
__device__ inline void finish(const DraftGraphAttentionArgs& args, const Work& work, const TileNode& node,
                              const Query& query, const float (&out)[kPairs][4], int half, SoftmaxState<float> state) {
  state.sum += __shfl_xor_sync(kAllLanes, state.sum, 1);
  state.sum += __shfl_xor_sync(kAllLanes, state.sum, 2);
  const int lane = threadIdx.x % 4;
  if (!query.is_there) {
    return;
  }
  const bool splits = is_split(args, node.rows);
  if (splits) {
    const Part part = part_of(args, work.split, query.row, node.rows, static_cast<int32_t>(node.node), query.head);
    for (int j = 0; j < kPairs && 8 * j < args.head_dim; ++j) {
      store_pair(part.out + 8 * j + 2 * lane, out[j][2 * half], out[j][2 * half + 1]);
    }
    if (lane == 0) {
      store_pair(part.max_and_sum, state.max, state.sum);
    }
  } else if (work.split == 0) {
    Float* to = out_of<Float>(args, query.row, query.head);
    const float factor = normalizer(state.sum);
    for (int j = 0; j < kPairs && 8 * j < args.head_dim; ++j) {
      store_pair(to + 8 * j + 2 * lane, out[j][2 * half] * factor, out[j][2 * half + 1] * factor);
    }
    if (args.lse != nullptr && lane == 0) {
      args.lse[int64_t{query.row} * args.num_heads + query.head] = log_sum_exp(state.max, log2f(state.sum));
    }
  }
}

// Rows behind those of the requests see nothing. Many a CTA has no row at all: the grid is made for the most tiles that
// there can be.
template <typename Float>
__device__ inline void clear(const DraftGraphAttentionArgs& args, const Work& work) {
  for (int i = threadIdx.x / 2; i < kQueries && work.split == 0; i += kNumThreads / 2) {
    const Query query = query_at(args, work, i);
    for (int j = threadIdx.x % 2 * 2; j < args.head_dim && query.is_there; j += 4) {
      store_pair(out_of<Float>(args, query.row, query.head) + j, 0.0f, 0.0f);
    }
    if (query.is_there && args.lse != nullptr) {
      args.lse[int64_t{query.row} * args.num_heads + query.head] = kNegativeInfinity;
    }
  }
}

// Enough CTAs share a multiprocessor that registers need not be spilled for more.
template <int kDim>
constexpr int kMinCtas = kDim <= 64    ? 3
                         : kDim <= 128 ? 2
                                       : 1;

template <typename Float, int kDim>
__global__ void __launch_bounds__(kNumThreads, kMinCtas<kDim>) attend(const DraftGraphAttentionArgs args) {
  DLLM_DYNAMIC_SHARED(bytes);
  auto& shared = *reinterpret_cast<Shared<Float, kDim>*>(bytes);
  constexpr int kColumns = kPositions<Float>;
  const int32_t heads_per_kv = args.num_heads / args.num_kv_heads;
  const int thread = threadIdx.x;

  const Work work = {find_query_tile(args, blockIdx.x), static_cast<int32_t>(blockIdx.y),
                     static_cast<int32_t>(blockIdx.z)};
  if (work.tile.request >= args.num_requests) {
    clear<Float>(args, work);
    return;
  }
  copy_queries<Float, kDim>(args, work, shared.queries);
  const Plan& plan = shared.plan;
  make_plan<kColumns>(args, work.tile.request, work.rows(heads_per_kv), work.split, shared.plan);

  const int first_query = thread / kWarp * 16;
  const int query[2] = {first_query + thread % kWarp / 4, first_query + thread % kWarp / 4 + 8};
  const int32_t node[2] = {find_node(plan, query_at(args, work, query[0]).row),
                           find_node(plan, query_at(args, work, query[1]).row)};
  SoftmaxState<float> state[2];
  float out[kDim / 8][4] = {};

  // Keys and values take turns: while one of them is worked on, the other one is on its way.
  KeyTile tile = first_visible<kColumns>(plan, {false, 0});
  if (thread < kColumns) {
    shared.sources[thread] = source_of(args, plan, work.tile.request, tile, thread);
  }
  __syncthreads();
  copy_keys<Float, kDim, false>(args, work.kv_head, tile, shared.sources, shared.keys);
  commit_copies();
  while (!tile.is_own || tile.begin < plan.num_slots) {
    copy_keys<Float, kDim, true>(args, work.kv_head, tile, shared.sources, shared.values);
    commit_copies();
    const KeyTile next = first_visible<kColumns>(plan, {tile.is_own, tile.begin + kColumns});
    const int64_t source = thread < kColumns ? source_of(args, plan, work.tile.request, next, thread) : kNowhere;

    wait_for_copies<1>();
    __syncthreads();
    float scores[kColumns / 8][4] = {};
    multiply_keys<Float, kDim>(scores, shared.queries, shared.keys, first_query);
    if (thread < kColumns) {
      shared.sources[thread] = source;
    }
    __syncthreads();
    copy_keys<Float, kDim, false>(args, work.kv_head, next, shared.sources, shared.keys);
    commit_copies();

#pragma unroll
    for (int half = 0; half < 2; ++half) {
      hide(scores, half, plan.nodes[node[half]], query_at(args, work, query[half]).row, tile);
      weigh(scores, out, half, args.scale * kLog2E, state[half]);
    }
    wait_for_copies<1>();
    __syncthreads();
    add_values<Float, kDim>(out, scores, shared.values);
    __syncthreads();
    tile = next;
  }
  wait_for_copies<0>();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    finish<Float>(args, work, plan.nodes[node[half]], query_at(args, work, query[half]), out, half, state[half]);
  }
}

// The node of a row of the batch; num_nodes if it is none's.
__device__ inline int32_t find_batch_node(const DraftGraphAttentionArgs& args, int32_t row) {
  const int32_t num_nodes = args.first_node[args.num_requests];
  int32_t low = 0, high = num_nodes;  // the last node that begins at or before the row is in [low - 1, high)
  while (low < high) {
    const int32_t middle = (low + high) / 2;
    if (args.first_row[middle] <= row) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low > 0 && row < args.first_row[low] ? low - 1 : args.num_nodes;
}

// Join the splits' parts of a row and head, in ascending order; a warp for each.
template <typename Float>
__global__ void __launch_bounds__(kNumThreads) merge(const DraftGraphAttentionArgs args) {
  constexpr int kPerLane = 256 / kWarp;
  const int64_t item = (int64_t{blockIdx.x} * kNumThreads + threadIdx.x) / kWarp;
  const int32_t row = static_cast<int32_t>(item / args.num_heads);
  const int32_t head = static_cast<int32_t>(item % args.num_heads);
  const int32_t node = row < args.num_rows ? find_batch_node(args, row) : args.num_nodes;
  if (node == args.num_nodes) {
    return;
  }
  const Interval node_rows = {args.first_row[node], args.first_row[node + 1]};
  if (!is_split(args, node_rows)) {
    return;
  }
  const int lane = threadIdx.x % kWarp;
  SoftmaxState<float> state;
  float out[kPerLane] = {};
  for (int32_t split = 0; split < context_split(args).num; ++split) {
    const Part part = part_of(args, split, row, node_rows, node, head);
    const float part_max = part.max_and_sum[0];
    const float factor = exp2f(raise_max(state, part_max));
    const float part_factor = exp2f(part_max - softmax_base(state.max));
    state.sum = state.sum * factor + part.max_and_sum[1] * part_factor;
    for (int i = 0; i < kPerLane && lane + i * kWarp < args.head_dim; ++i) {
      out[i] = out[i] * factor + part.out[lane + i * kWarp] * part_factor;
    }
  }
  Float* to = out_of<Float>(args, row, head);
  const float factor = normalizer(state.sum);
  for (int i = 0; i < kPerLane && lane + i * kWarp < args.head_dim; ++i) {
    to[lane + i * kWarp] = from_float<Float>(out[i] * factor);
  }
  if (args.lse != nullptr && lane == 0) {
    args.lse[item] = log_sum_exp(state.max, log2f(state.sum));
  }
}

template <typename Float, int kDim>
const char* launch_attend(const DraftGraphAttentionArgs& args, Stream stream) {
  static_assert(sizeof(Shared<Float, kDim>) <= 99 << 10, "more shared memory than GPUs of compute capability 8.6 have");
  const int32_t heads_per_kv = args.num_heads / args.num_kv_heads;
  const auto max_tiles =
      static_cast<unsigned>(int64_t{args.num_rows} * heads_per_kv / kQueries + args.num_requests + 1);
  const dim3 ctas = {max_tiles, static_cast<unsigned>(args.num_kv_heads),
                     static_cast<unsigned>(context_split(args).num)};
  return launch(attend<Float, kDim>, {ctas, kNumThreads, sizeof(Shared<Float, kDim>)}, stream, args);
}

template <typename Float>
const char* launch_both(const DraftGraphAttentionArgs& args, Stream stream) {
  const auto attend = args.head_dim <= 32    ? launch_attend<Float, 32>
                      : args.head_dim <= 64  ? launch_attend<Float, 64>
                      : args.head_dim <= 128 ? launch_attend<Float, 128>
                                             : launch_attend<Float, 256>;
  const char* error = attend(args, stream);
  if (error != nullptr || context_split(args).num == 1) {
    return error;
  }
  constexpr int kWarps = kNumThreads / kWarp;
  const auto num_ctas = static_cast<unsigned>((int64_t{args.num_rows} * args.num_heads + kWarps - 1) / kWarps);
  return launch(merge<Float>, {dim3{num_ctas}, kNumThreads, 0}, stream, args);
}

}  // namespace

const char* draft_graph_attention(const DraftGraphAttentionArgs& args, Stream stream) {
  if (args.num_rows == 0) {
    return nullptr;
  }
  switch (args.type) {
    case FloatType::kFloat32:
      return launch_both<float>(args, stream);
    case FloatType::kFloat16:
      return launch_both<Half>(args, stream);
    default:
      return launch_both<BFloat16>(args, stream);
  }
}

}  // namespace dllm::cuda
