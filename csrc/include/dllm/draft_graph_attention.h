// draft_graph_attention: attention of all nodes of all requests to their paged context and to themselves.
#pragma once

#include "dllm/types.h"
#include "dllm/visible.h"

namespace dllm {

// Strides of packed rows [num_rows, num_heads, head_dim]; head_dim is contiguous.
struct RowStrides {
  int64_t row;
  int64_t head;
};

// What a CTA of the CUDA kernel works on, made on the host once per step (vllm_dllm/attention/tiles.py): kTileQueries
// queries of a request and a K/V head, those of a request numbered row by row, heads_per_kv for each. A tile without
// nodes has the rows [first_row, end_row) that are nobody's and see nothing, or none.
struct alignas(16) QueryTile {
  int32_t request;
  int32_t first_query;  // of the request
  int32_t first_row;    // of the request
  int32_t end_row;
  int32_t first_node;  // of the tile
  int32_t end_node;
  int32_t unused[2];
};

// For each row i and head h, with j over what `visible.h` lets the row see and g the head's K/V head:
//   s_j = scale * <query[i, h], key_j>,   out[i, h] = sum_j softmax(s)_j value_j,   lse[i, h] = log sum_j exp(s_j)
// A row that sees nothing, as those behind the last request's nodes, gives out 0 and lse -inf. Sums are float32, in an
// order that depends on nothing but the row's own context and node, and on num_splits on CUDA: stored positions
// ascending and the node's rows ascending, on CUDA last, in tiles. What no row of a request sees is never read, and NaN
// among what one node sees does not reach the others.
struct DraftGraphAttentionArgs {
  FloatType type;             // of query, key, value, kv_cache and out
  const void* query;          // [num_rows, num_heads, head_dim]
  const void* key;            // [num_rows, num_kv_heads, head_dim]
  const void* value;          // [num_rows, num_kv_heads, head_dim]
  const void* kv_cache;       // [num_pages, num_kv_heads, page_size, 2 * head_dim], keys before values
  const int32_t* page_table;  // [num_requests, max_pages]
  const int32_t* first_node;  // [num_requests + 1], contiguous; of request r: [first_node[r], first_node[r + 1])
  const int32_t* first_row;   // [num_nodes + 1], contiguous; of node n: [first_row[n], first_row[n + 1])
  const Context* context;     // [num_nodes], contiguous
  const int32_t* is_causal;   // [num_nodes], contiguous; 1: a row sees of its node's rows itself and those before
  const QueryTile* tiles;     // [num_tiles], contiguous, that have each row once; CUDA only
  void* out;                  // [num_rows, num_heads, head_dim]
  float* lse;                 // [num_rows, num_heads], contiguous; nullptr: not wanted
  float* workspace;           // [attention_workspace(args)], contents lost; CUDA only
  RowStrides query_strides;
  RowStrides key_strides;
  RowStrides value_strides;
  RowStrides out_strides;
  int64_t cache_page_stride;
  int64_t cache_head_stride;
  int64_t cache_position_stride;
  int64_t page_table_stride;
  float scale;
  int32_t num_rows;
  int32_t num_requests;
  int32_t num_nodes;
  int32_t num_pages;
  int32_t max_pages;
  int32_t page_size;
  int32_t num_heads;
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t num_tiles;   // CUDA only
  int32_t num_splits;  // CUDA only: CTAs that divide a context among them
};

constexpr int32_t kTileQueries = 64;
constexpr int32_t kLeastSplit = 128;  // stored positions: two tiles of keys
constexpr int32_t kMaxSplits = 32;

// How CUDA divides a node's stored positions among `num_splits` CTAs: `split` takes those in the interval, the last one
// the node's own rows too. It depends on the node's own context, so that other nodes do not change a row's sums.
DLLM_HOST_DEVICE inline Interval split_share(const Context& context, int32_t num_splits, int32_t split) {
  constexpr int32_t kMultiple = 64;  // of every tile
  const Interval first = is_empty(context.interval[0]) ? context.interval[1] : context.interval[0];
  const Interval last = is_empty(context.interval[1]) ? context.interval[0] : context.interval[1];
  if (is_empty(first)) {
    return {0, 0};
  }
  const int32_t begin = first.begin / kMultiple * kMultiple;
  const int32_t each = ((last.end - begin + num_splits - 1) / num_splits + kMultiple - 1) / kMultiple * kMultiple;
  const int32_t len = each < kLeastSplit ? kLeastSplit : each;
  return {begin + split * len, begin + (split + 1) * len};
}

// Floats that the splits need to hand over their sums: out, max and sum of each row and head.
inline int64_t attention_workspace(const DraftGraphAttentionArgs& args) {
  return args.num_splits == 1 ? 0 : int64_t{args.num_splits} * args.num_rows * args.num_heads * (args.head_dim + 2);
}

namespace cpu {
void draft_graph_attention(const DraftGraphAttentionArgs& args);
}

namespace cuda {
const char* draft_graph_attention(const DraftGraphAttentionArgs& args, Stream stream);
}

}  // namespace dllm
