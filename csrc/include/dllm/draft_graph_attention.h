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

// For each row i and head h, with j over what `visible.h` lets the row see and g the head's K/V head:
//   s_j = scale * <query[i, h], key_j>,   out[i, h] = sum_j softmax(s)_j value_j,   lse[i, h] = log sum_j exp(s_j)
// A row that sees nothing, as those behind the last request's nodes, gives out 0 and lse -inf. Sums are float32, in an
// order that depends on nothing but the row's own context and node: stored positions ascending and the node's rows
// ascending, on CUDA last, in tiles. What no row of a request sees is never read. CUDA weighs a value that one node of
// a request sees by 0 for the other nodes, so that NaN among these values may reach them.
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
};

// How CUDA divides the stored positions of a node with at most kSplitRows rows among CTAs: split i takes
// [i * len, (i + 1) * len), the last one the node's own rows too. Made from the page table's shape, so that a row's
// sums do not depend on the other requests.
struct ContextSplit {
  int32_t num;
  int32_t len;
};

constexpr int32_t kSplitRows = 64;   // larger nodes give enough CTAs
constexpr int32_t kSplitLen = 1024;  // the least
constexpr int32_t kMaxSplits = 16;   // bounds the workspace

DLLM_HOST_DEVICE inline ContextSplit context_split(const DraftGraphAttentionArgs& args) {
  constexpr int32_t kMultiple = 64;  // of every tile
  const int32_t capacity = args.max_pages * args.page_size;
  const int32_t wanted = (capacity + kSplitLen - 1) / kSplitLen;
  const int32_t num = wanted < 1 ? 1 : wanted > kMaxSplits ? kMaxSplits : wanted;
  const int32_t len = (capacity + num - 1) / num;
  return {num, (len + kMultiple - 1) / kMultiple * kMultiple};
}

// Rows of the workspace: all, or kSplitRows of each node where these are fewer (see workspace_row).
DLLM_HOST_DEVICE inline int64_t workspace_rows(const DraftGraphAttentionArgs& args) {
  const int64_t of_nodes = static_cast<int64_t>(args.num_nodes) * kSplitRows;
  return args.num_rows < of_nodes ? args.num_rows : of_nodes;
}

// Floats that the splits need to hand over their sums: out, max and sum of each row and head.
inline int64_t attention_workspace(const DraftGraphAttentionArgs& args) {
  const int64_t num_splits = context_split(args).num;
  return num_splits == 1 ? 0 : num_splits * workspace_rows(args) * args.num_heads * (args.head_dim + 2);
}

namespace cpu {
void draft_graph_attention(const DraftGraphAttentionArgs& args);
}

namespace cuda {
const char* draft_graph_attention(const DraftGraphAttentionArgs& args, Stream stream);
}

}  // namespace dllm
