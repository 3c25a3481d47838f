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
  uint8_t is_broken[kPositions<Float>];
  Plan plan;
};

// A CTA's place in the grid.
struct Work {
  QueryTile tile;
  int32_t kv_head;
  int32_t split;

  __device__ Interval rows(int32_t heads_per_kv) const {
    const int32_t first = tile.first_row + tile.first_query / heads_per_kv;
    const int32_t last = tile.first_row + (tile.first_query + kQueries - 1) / heads_per_kv;
    return {first, min(last + 1, tile.end_row)};
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
  const int32_t row = work.tile.first_row + query / heads_per_kv;
  return {row, work.kv_head * heads_per_kv + query % heads_per_kv, row < work.tile.end_row};
}

// Hide from a query, `half` of the thread's two, the keys that it does not see.
template <int kPairs>
__device__ inline void hide(float (&scores)[kPairs][4], int half, const TileNode& node, int32_t row, KeyTile tile) {
  const Interval seen = {tile.begin, tile.begin + 8 * kPairs};
  if (!tile.is_own && (covers(node.context.interval[0], seen) || covers(node.context.interval[1], seen))) {
    return;
  }
  const int32_t first = tile.begin + threadIdx.x % 4 * 2;
#pragma unroll
  for (int j = 0; j < 2 * kPairs; ++j) {
    float& score = scores[j / 2][2 * half + j % 2];
    score = sees(node, row, tile, first + j / 2 * 8 + j % 2) ? score : kNegativeInfinity;
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
  const auto* all = static_cast<const Float*>(args.query);
  copy_rows<Float, kDim>(tile, kQueries, args.head_dim, all, [&](int i) -> const Float* {
    const Query query = query_at(args, work, i);
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
  copy_rows<Float, kDim>(to, kPositions<Float>, args.head_dim, rows, [&](int i) -> const Float* {
    const int64_t source = sources[i];
    return source == kNowhere ? nullptr : tile.is_own ? rows + source * strides.row : stored + source;
  });
}

// Where a split leaves its sums: [num_splits, num_rows, num_heads], out of head_dim numbers, then max and sum. Of one
// that had nothing, max is -inf and the others are not written.
struct Part {
  float* out;
  float* max_and_sum;
};

__device__ inline Part part_of(const DraftGraphAttentionArgs& args, int32_t split, int32_t row, int32_t head) {
  const int64_t index = (int64_t{split} * args.num_rows + row) * args.num_heads + head;
  const int64_t num_parts = int64_t{args.num_splits} * args.num_rows * args.num_heads;
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
  if (args.num_splits > 1) {
    const Part part = part_of(args, work.split, query.row, query.head);
    const bool is_idle = has_nothing(node);
    for (int j = 0; j < kPairs && 8 * j < args.head_dim && !is_idle; ++j) {
      store_pair(part.out + 8 * j + 2 * lane, out[j][2 * half], out[j][2 * half + 1]);
    }
    if (lane == 0) {  // the maximum of nothing but NaN is -inf, which would say that there is nothing
      store_pair(part.max_and_sum, state.sum == state.sum ? state.max : state.sum, state.sum);
    }
  } else {
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

// Write of all queries that they see nothing, here or in this split.
template <typename Float>
__device__ inline void write_nothing(const DraftGraphAttentionArgs& args, const Work& work) {
  for (int i = threadIdx.x / 2; i < kQueries; i += kNumThreads / 2) {
    const Query query = query_at(args, work, i);
    if (!query.is_there) {
      continue;
    }
    if (args.num_splits > 1) {
      part_of(args, work.split, query.row, query.head).max_and_sum[0] = kNegativeInfinity;
      continue;
    }
    for (int j = threadIdx.x % 2 * 2; j < args.head_dim; j += 4) {
      store_pair(out_of<Float>(args, query.row, query.head) + j, 0.0f, 0.0f);
    }
    if (args.lse != nullptr) {
      args.lse[int64_t{query.row} * args.num_heads + query.head] = kNegativeInfinity;
    }
  }
}

// Give NaN to the queries, `half` of the thread's two, that see a value which `zero_broken` found: of a value that is
// not finite, the product with the weight 0 of a query that does not see it would be NaN.
template <int num_positions, int kPairs>
__device__ inline void spread_broken(const uint8_t (&is_broken)[num_positions], const TileNode& node, int32_t row,
                                     KeyTile tile, float (&out)[kPairs][4], int half) {
  bool sees_broken = false;
  for (int i = 0; i < num_positions; ++i) {
    sees_broken = sees_broken || (is_broken[i] != 0 && sees(node, row, tile, tile.begin + i));
  }
#pragma unroll
  for (int j = 0; j < 2 * kPairs; ++j) {
    float& value = out[j / 2][2 * half + j % 2];
    value = sees_broken ? __uint_as_float(0x7fffffff) : value;
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

  const Work work = {args.tiles[blockIdx.x], static_cast<int32_t>(blockIdx.y), static_cast<int32_t>(blockIdx.z)};
  const Plan& plan = shared.plan;
  if (work.tile.first_node < work.tile.end_node) {
    make_plan<kColumns>(args, work.tile, work.rows(heads_per_kv), work.split, shared.plan);
  }
  if (work.tile.first_node == work.tile.end_node || is_idle(plan)) {
    write_nothing<Float>(args, work);
    return;
  }
  copy_queries<Float, kDim>(args, work, shared.queries);

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
    const bool may_spread = is_mixed(plan, tile, kColumns);
    if (may_spread) {
      zero_broken<Float, kDim>(shared.values, args.head_dim, shared.is_broken);
      __syncthreads();
    }
    add_values<Float, kDim>(out, scores, shared.values);
    for (int half = 0; half < 2 && may_spread; ++half) {
      spread_broken(shared.is_broken, plan.nodes[node[half]], query_at(args, work, query[half]).row, tile, out, half);
    }
    __syncthreads();
    tile = next;
  }
  wait_for_copies<0>();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    finish<Float>(args, work, plan.nodes[node[half]], query_at(args, work, query[half]), out, half, state[half]);
  }
}

// Join the splits' parts of a row and head, in ascending order; a warp for each.
template <typename Float>
__global__ void __launch_bounds__(kNumThreads) merge(const DraftGraphAttentionArgs args) {
  constexpr int kPerLane = 256 / kWarp;
  const int64_t item = (int64_t{blockIdx.x} * kNumThreads + threadIdx.x) / kWarp;
  const auto row = static_cast<int32_t>(item / args.num_heads);
  const auto head = static_cast<int32_t>(item % args.num_heads);
  if (row >= args.num_rows) {
    return;
  }
  const int lane = threadIdx.x % kWarp;
  SoftmaxState<float> state;
  float out[kPerLane] = {};
  for (int32_t split = 0; split < args.num_splits; ++split) {
    const Part part = part_of(args, split, row, head);
    const float part_max = part.max_and_sum[0];
    if (part_max == kNegativeInfinity) {
      continue;
    }
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
  const dim3 ctas = {static_cast<unsigned>(args.num_tiles), static_cast<unsigned>(args.num_kv_heads),
                     static_cast<unsigned>(args.num_splits)};
  return launch(attend<Float, kDim>, {ctas, kNumThreads, sizeof(Shared<Float, kDim>)}, stream, args);
}

template <typename Float>
const char* launch_both(const DraftGraphAttentionArgs& args, Stream stream) {
  const auto attend = args.head_dim <= 32    ? launch_attend<Float, 32>
                      : args.head_dim <= 64  ? launch_attend<Float, 64>
                      : args.head_dim <= 128 ? launch_attend<Float, 128>
                                             : launch_attend<Float, 256>;
  const char* error = attend(args, stream);
  if (error != nullptr || args.num_splits == 1) {
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
