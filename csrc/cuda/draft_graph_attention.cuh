// Parts of draft_graph_attention.cu: what a CTA works on, tiles in shared memory, products of tiles.
//
// A query is a row's vector of one head. Those of a request that share a K/V head are numbered row by row and cut into
// tiles of kQueries; query q of a request is of its row q / heads_per_kv. Four warps take 16 queries each. A thread has
// two of them, number lane / 4 and lane / 4 + 8 of its warp, and of each matrix with 8 * n columns the n pairs
// 8 * j + 2 * (lane % 4), as mma.m16n8k16 lays them out; fp32, without tensor cores, keeps the same places.
#pragma once

#include "dllm/draft_graph_attention.h"
#include "dllm/softmax_state.h"
#include "ptx.cuh"

namespace dllm::cuda {

constexpr int kQueries = kTileQueries;
constexpr int kNumThreads = 128;
constexpr int kDepth = 16;  // columns that one mma sums over

// Stored positions, or own rows, of a tile. 16 for fp32: Q, K and V of head size 256 fit the 99 KB of the smaller GPUs.
template <typename Float>
constexpr int kPositions = sizeof(Float) == 2 ? 64 : 16;

__device__ inline int32_t round_up(int32_t value, int32_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// ---- Which keys and values

// Own rows lie in slots, since a node's place among the packed rows must not change its sums: each node begins at a
// multiple of kDepth, and in a tile that it fits into or at the begin of one.
struct TileNode {
  Interval rows;
  Context context;  // of this split
  Interval slots;   // of its rows, in a causal node up to the tile's last; empty in a split without own rows
  int32_t is_causal;
};

struct Plan {
  TileNode nodes[kQueries];    // those that a tile of queries has rows of, ascending
  uint8_t contexts[kQueries];  // of which nodes the context is not that of the node before
  int32_t num_nodes;
  int32_t num_contexts;
  int32_t num_slots;
};

// Limit a node to what split number `split` has of it, and rows before `rows_end` see.
template <int num_positions>
__device__ inline void take_share(const DraftGraphAttentionArgs& args, int32_t split, int32_t rows_end, TileNode& node,
                                  int32_t& num_slots) {
  if (args.num_splits > 1) {
    const Interval share = split_share(node.context, args.num_splits, split);
    for (Interval& interval : node.context.interval) {
      interval = intersect(interval, share);
    }
  }
  node.slots = {0, 0};
  if (split == args.num_splits - 1) {
    const int32_t num_rows = (node.is_causal != 0 ? min(node.rows.end, rows_end) : node.rows.end) - node.rows.begin;
    const int32_t padded = round_up(num_rows, kDepth);
    if (num_slots % num_positions + padded > num_positions) {
      num_slots = round_up(num_slots, num_positions);
    }
    node.slots = {num_slots, num_slots + num_rows};
    num_slots += padded;
  }
}

__device__ inline bool has_nothing(const TileNode& node) {
  return is_empty(node.context.interval[0]) && is_empty(node.context.interval[1]) && is_empty(node.slots);
}

// One thread: nodes[row - rows.begin] holds the node whose first row in the tile is `row`; put them side by side.
template <int num_positions>
__device__ inline void arrange_nodes(const DraftGraphAttentionArgs& args, Interval rows, int32_t split, Plan& plan) {
  int32_t num_nodes = 0, num_contexts = 0, num_slots = 0;
  for (int32_t row = rows.begin; row < rows.end;) {
    TileNode node = plan.nodes[row - rows.begin];
    row = node.rows.end;
    take_share<num_positions>(args, split, rows.end, node, num_slots);
    if (num_nodes == 0 || !is_same(node.context, plan.nodes[num_nodes - 1].context)) {
      plan.contexts[num_contexts++] = static_cast<uint8_t>(num_nodes);
    }
    plan.nodes[num_nodes++] = node;
  }
  plan.num_nodes = num_nodes;
  plan.num_contexts = num_contexts;
  plan.num_slots = num_slots;
}

// All threads: fill the plan for the rows of a tile of queries.
template <int num_positions>
__device__ inline void make_plan(const DraftGraphAttentionArgs& args, const QueryTile& tile, Interval rows,
                                 int32_t split, Plan& plan) {
  for (int32_t node = tile.first_node + static_cast<int32_t>(threadIdx.x); node < tile.end_node; node += kNumThreads) {
    const Interval of_node = {args.first_row[node], args.first_row[node + 1]};
    const Interval inside = intersect(of_node, rows);
    if (!is_empty(inside)) {
      plan.nodes[inside.begin - rows.begin] = {of_node, args.context[node], {0, 0}, args.is_causal[node]};
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    arrange_nodes<num_positions>(args, rows, split, plan);
  }
  __syncthreads();
}

// Whether a split has nothing for any of the tile's queries.
__device__ inline bool is_idle(const Plan& plan) {
  if (plan.num_slots > 0) {
    return false;
  }
  for (int32_t i = 0; i < plan.num_contexts; ++i) {
    if (!has_nothing(plan.nodes[plan.contexts[i]])) {
      return false;
    }
  }
  return true;
}

// Where the plan has the node of a row of the tile; of one behind its end, the last node.
__device__ inline int32_t find_node(const Plan& plan, int32_t row) {
  int32_t node = 0;
  while (node + 1 < plan.num_nodes && plan.nodes[node].rows.end <= row) {
    ++node;
  }
  return node;
}

// Positions, or slots of own rows, [begin, begin + kPositions).
struct KeyTile {
  bool is_own;
  int32_t begin;
};

// The first tile from `tile` on that holds something visible; behind the last one it is_own and begins at num_slots or
// later.
template <int num_positions>
__device__ inline KeyTile first_visible(const Plan& plan, KeyTile tile) {
  if (tile.is_own) {
    return tile;
  }
  constexpr int32_t kNone = 0x7fffffff;
  int32_t next = kNone;
  for (int32_t i = 0; i < plan.num_contexts; ++i) {
    for (const Interval& interval : plan.nodes[plan.contexts[i]].context.interval) {
      const Interval rest = intersect(interval, {tile.begin, kNone});
      next = is_empty(rest) ? next : min(next, rest.begin);
    }
  }
  return next == kNone ? KeyTile{true, 0} : KeyTile{false, next / num_positions * num_positions};
}

__device__ inline bool covers(Interval outer, Interval inner) {
  return outer.begin <= inner.begin && inner.end <= outer.end;
}

// Whether some of the tile's queries see a key that others do not see. Keys that none sees are zeros.
__device__ inline bool is_mixed(const Plan& plan, KeyTile tile, int32_t num_positions) {
  if (tile.is_own) {
    return plan.num_nodes > 1 || plan.nodes[0].is_causal != 0;
  }
  const Interval whole = {tile.begin, tile.begin + num_positions};
  for (int32_t i = 0; plan.num_contexts > 1 && i < plan.num_contexts; ++i) {
    const Context& context = plan.nodes[plan.contexts[i]].context;
    if (!covers(context.interval[0], whole) && !covers(context.interval[1], whole)) {
      return true;
    }
  }
  return false;
}

// Whether a query of a node's row `row` sees key `at`.
__device__ inline bool sees(const TileNode& node, int32_t row, KeyTile tile, int32_t at) {
  if (!tile.is_own) {
    return sees_stored(node.context, at);
  }
  const int32_t num_seen = seen_rows(node.rows, node.is_causal != 0, row).end - node.rows.begin;
  return contains(node.slots, at) && at < node.slots.begin + num_seen;
}

constexpr int64_t kNowhere = -1;

// Where column `i` of a tile comes from: the stored key's place in kv_cache, or a row; kNowhere if no node sees it, so
// that nothing is read of pages that hold nothing yet.
__device__ inline int64_t source_of(const DraftGraphAttentionArgs& args, const Plan& plan, int32_t request,
                                    KeyTile tile, int32_t i) {
  const int32_t at = tile.begin + i;
  if (tile.is_own) {
    for (int32_t node = 0; node < plan.num_nodes; ++node) {
      if (contains(plan.nodes[node].slots, at)) {
        return plan.nodes[node].rows.begin + at - plan.nodes[node].slots.begin;
      }
    }
    return kNowhere;
  }
  bool is_visible = false;
  for (int32_t context = 0; context < plan.num_contexts; ++context) {
    is_visible = is_visible || sees_stored(plan.nodes[plan.contexts[context]].context, at);
  }
  if (!is_visible) {
    return kNowhere;
  }
  const int32_t page = args.page_table[request * args.page_table_stride + at / args.page_size];
  return page * args.cache_page_stride + at % args.page_size * args.cache_position_stride;
}

// ---- Tiles in shared memory

// [rows, kDim] in chunks of 16 bytes. Chunks change places by row, so that the eight rows of a matrix that ldmatrix
// reads, at one column, lie in different banks.
template <typename Float, int kDim>
__device__ inline Float* chunk_at(Float* tile, int row, int chunk) {
  constexpr int kChunks = kDim * sizeof(Float) / 16;
  const int place = chunk ^ (kChunks >= 8 ? row % 8 : row / 2 % 4);
  return tile + row * kDim + place * (16 / static_cast<int>(sizeof(Float)));
}

// Begin to copy rows of head_dim numbers; zeros where `row_at` gives no row, and up to kDim. Neighbouring threads copy
// neighbouring chunks, 128 bytes of a row. `anywhere` is an address that may be read: a copy of nothing has one, too.
template <typename Float, int kDim, typename RowAt>
__device__ inline void copy_rows(Float* tile, int num_rows, int head_dim, const Float* anywhere, RowAt row_at) {
  constexpr int kPerChunk = 16 / sizeof(Float);
  constexpr int kChunks = kDim / kPerChunk;
  constexpr int kRowThreads = kChunks < 8 ? kChunks : 8;
  const int thread = threadIdx.x;
  for (int row = thread / kRowThreads; row < num_rows; row += kNumThreads / kRowThreads) {
    const Float* from = row_at(row);
    for (int chunk = thread % kRowThreads; chunk < kChunks; chunk += kRowThreads) {
      const bool is_there = from != nullptr && chunk * kPerChunk < head_dim;
      copy_async_16(chunk_at<Float, kDim>(tile, row, chunk), is_there ? from + chunk * kPerChunk : anywhere, is_there);
    }
  }
}

// All threads: put zeros where values are not finite, and tell of each row whether it has such.
template <typename Float, int kDim>
__device__ inline void zero_broken(Float* tile, int head_dim, uint8_t (&is_broken)[kPositions<Float>]) {
  constexpr int kPerChunk = 16 / sizeof(Float);
  const int lane = threadIdx.x % kWarp;
  for (int row = threadIdx.x / kWarp; row < kPositions<Float>; row += kNumThreads / kWarp) {
    bool is_finite = true;
    for (int column = lane; column < head_dim; column += kWarp) {
      Float& value = chunk_at<Float, kDim>(tile, row, column / kPerChunk)[column % kPerChunk];
      if (!(fabsf(to_float(value)) <= 3.40282347e38f)) {
        value = from_float<Float>(0.0f);
        is_finite = false;
      }
    }
    const unsigned broken = __ballot_sync(kAllLanes, !is_finite);
    if (lane == 0) {
      is_broken[row] = broken != 0;
    }
  }
}

// ---- Products, on tensor cores for 16-bit types

// scores = Q K^T, for the 16 queries of a warp that begin at `query`.
template <typename Float, int kDim, int kPairs>
__device__ inline void multiply_keys(float (&scores)[kPairs][4], Float* queries, Float* keys, int query) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int k = 0; k < kDim / kDepth; ++k) {
    uint32_t a[4];
    load_matrices(a, chunk_at<Float, kDim>(queries, query + lane % 16, 2 * k + lane / 16));
#pragma unroll
    for (int j = 0; j < kPairs; j += 2) {
      uint32_t b[4];
      load_matrices(b, chunk_at<Float, kDim>(keys, 8 * j + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
      multiply_add<Float>(scores[j], a, b[0], b[1]);
      multiply_add<Float>(scores[j + 1], a, b[2], b[3]);
    }
  }
}

template <typename Float, int kDim, int kPairs>
  requires std::is_same_v<Float, float>
__device__ inline void multiply_keys(float (&scores)[kPairs][4], float* queries, float* keys, int query) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll 1
  for (int chunk = 0; chunk < kDim / 4; ++chunk) {
#pragma unroll
    for (int i = 0; i < 4 * kPairs; ++i) {
      const int row = query + lane / 4 + i % 4 / 2 * 8;
      const int column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      const auto q = *reinterpret_cast<const float4*>(chunk_at<float, kDim>(queries, row, chunk));
      const auto k = *reinterpret_cast<const float4*>(chunk_at<float, kDim>(keys, column, chunk));
      float& score = scores[i / 4][i % 4];
      score = fmaf(q.x, k.x, fmaf(q.y, k.y, fmaf(q.z, k.z, fmaf(q.w, k.w, score))));
    }
  }
}

// out += P V, with P rounded to the type of V.
template <typename Float, int kDim, int kOutPairs, int kPairs>
__device__ inline void add_values(float (&out)[kOutPairs][4], const float (&weights)[kPairs][4], Float* values) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int k = 0; k < kPairs / 2; ++k) {
    const uint32_t a[4] = {pack<Float>(weights[2 * k][0], weights[2 * k][1]),
                           pack<Float>(weights[2 * k][2], weights[2 * k][3]),
                           pack<Float>(weights[2 * k + 1][0], weights[2 * k + 1][1]),
                           pack<Float>(weights[2 * k + 1][2], weights[2 * k + 1][3])};
#pragma unroll
    for (int j = 0; j < kOutPairs; j += 2) {
      uint32_t b[4];
      load_matrices_transposed(b, chunk_at<Float, kDim>(values, kDepth * k + lane % 16, j + lane / 16));
      multiply_add<Float>(out[j], a, b[0], b[1]);
      multiply_add<Float>(out[j + 1], a, b[2], b[3]);
    }
  }
}

template <typename Float, int kDim, int kOutPairs, int kPairs>
  requires std::is_same_v<Float, float>
__device__ inline void add_values(float (&out)[kOutPairs][4], const float (&weights)[kPairs][4], Float* values) {
  const int lane = threadIdx.x % kWarp;
  // Column 8 * pair + 2 * owner + parity of a row's weights is in one of the row's four lanes, the owner.
#pragma unroll 1
  for (int owner = 0; owner < 4; ++owner) {
#pragma unroll
    for (int i = 0; i < 2 * kPairs; ++i) {
      const float low = __shfl_sync(kAllLanes, weights[i / 2][i % 2], owner, 4);
      const float high = __shfl_sync(kAllLanes, weights[i / 2][2 + i % 2], owner, 4);
      const int column = i / 2 * 8 + owner * 2 + i % 2;
#pragma unroll
      for (int j = 0; j < kOutPairs; ++j) {
        const float* chunk = chunk_at<float, kDim>(values, column, 2 * j + lane % 4 / 2);
        const auto value = *reinterpret_cast<const float2*>(chunk + lane % 2 * 2);
        out[j][0] = fmaf(low, value.x, out[j][0]);
        out[j][1] = fmaf(low, value.y, out[j][1]);
        out[j][2] = fmaf(high, value.x, out[j][2]);
        out[j][3] = fmaf(high, value.y, out[j][3]);
      }
    }
  }
}

}  // namespace dllm::cuda
