#include "dllm/draft_graph_attention.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "library.h"

namespace dllm {
namespace {

constexpr const char* kOp = "draft_graph_attention";

void check_argument(const char* name, const Tensor& tensor, const Sizes& sizes, ScalarType type, const Tensor& query) {
  check_shape(kOp, name, tensor, sizes, "give the tensors of one layer and one layout");
  check_type(kOp, name, tensor, type);
  check_last_contiguous(kOp, name, tensor);
  check_device(kOp, name, tensor, query);
}

// CUDA copies 16 bytes at a time.
void check_aligned(const char* name, const Tensor& tensor) {
  bool is_aligned = reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
  for (int64_t dim = 0; dim + 1 < tensor.dim(); ++dim) {
    is_aligned = is_aligned && tensor.stride(dim) * static_cast<int64_t>(tensor.element_size()) % 16 == 0;
  }
  check(is_aligned, kOp, name, " has strides ", strides(tensor),
        ", on CUDA all but the last and the address must be multiples of 16 bytes; call .contiguous()");
}

void check_ascending(const char* name, const int32_t* first, int64_t count, int64_t limit) {
  check(first[0] == 0, kOp, name, " must begin with 0, got ", first[0], "; give running sums");
  for (int64_t i = 0; i < count; ++i) {
    check(first[i] <= first[i + 1] && first[i + 1] <= limit, kOp, name, " must ascend to at most ", limit, ", got ",
          first[i + 1], " after ", first[i], "; give running sums");
  }
}

// What a node may read; an interval without positions may hold anything.
void check_context(const DraftGraphAttentionArgs& args, int32_t request, int32_t node) {
  const int32_t* pages = args.page_table + request * args.page_table_stride;
  int64_t least = 0;
  for (const Interval& seen : args.context[node].interval) {
    if (is_empty(seen)) {
      continue;
    }
    const int64_t limit = int64_t{args.max_pages} * args.page_size;
    check(least <= seen.begin && seen.end <= limit, kOp, "context of node ", node, " has the interval [", seen.begin,
          ", ", seen.end, "), allowed are positions ", least, " to ", limit,
          "; give disjoint intervals in ascending order within the page table");
    least = seen.end;
    for (int32_t page = seen.begin / args.page_size; page <= (seen.end - 1) / args.page_size; ++page) {
      check(0 <= pages[page] && pages[page] < args.num_pages, kOp, "page_table[", request, "][", page, "] is ",
            pages[page], ", the cache has pages 0 to ", args.num_pages - 1, " and node ", node,
            " sees that page; give its page, or less context");
    }
  }
}

// Tiles have each query once, in the order of the rows, with the nodes that these are of.
void check_tiles(const DraftGraphAttentionArgs& args) {
  const int64_t heads_per_kv = args.num_heads / args.num_kv_heads;
  const int32_t end_row = args.first_row[args.first_node[args.num_requests]];
  int64_t done = 0;  // queries of a K/V head
  for (int32_t i = 0; i < args.num_tiles; ++i) {
    const QueryTile& tile = args.tiles[i];
    if (tile.first_row == tile.end_row) {
      continue;
    }
    const bool is_known = 0 <= tile.request && tile.request < args.num_requests;
    const int32_t begin = is_known ? args.first_row[args.first_node[tile.request]] : end_row;
    const int32_t end = is_known ? args.first_row[args.first_node[tile.request + 1]] : args.num_rows;
    const int64_t first = begin * heads_per_kv + tile.first_query;
    const int64_t last = std::min(first + kTileQueries, end * heads_per_kv);
    const bool is_next = tile.first_row == begin && tile.end_row == end && first == done && first < last;
    const bool has_nodes = is_known
                               ? args.first_node[tile.request] <= tile.first_node && tile.first_node < tile.end_node &&
                                     tile.end_node <= args.first_node[tile.request + 1] &&
                                     args.first_row[tile.first_node] <= first / heads_per_kv &&
                                     (last - 1) / heads_per_kv < args.first_row[tile.end_node]
                               : tile.first_node == tile.end_node;
    check(is_next && has_nodes, kOp, "tiles[", i, "] is query ", tile.first_query, " of request ", tile.request,
          " with rows [", tile.first_row, ", ", tile.end_row, ") and nodes [", tile.first_node, ", ", tile.end_node,
          "), which does not follow query ", done, " in the layout; give what attention.tiles.query_tiles makes of it");
    done = last;
  }
  check(done == args.num_rows * heads_per_kv, kOp, "tiles end with query ", done, ", the rows have ",
        args.num_rows * heads_per_kv, "; give what attention.tiles.query_tiles makes of the layout");
}

// Only where reading values costs no synchronisation.
void check_values(const DraftGraphAttentionArgs& args) {
  for (int32_t node = 0; node < args.num_nodes; ++node) {
    check(args.is_causal[node] == 0 || args.is_causal[node] == 1, kOp, "is_causal[", node, "] is ",
          args.is_causal[node], ", allowed are 0 and 1; give 1 where a row sees no later row of its node");
  }
  check_ascending("first_node", args.first_node, args.num_requests, args.num_nodes);
  check_ascending("first_row", args.first_row, args.num_nodes, args.num_rows);
  for (int32_t request = 0; request < args.num_requests; ++request) {
    const int32_t first = args.first_node[request];
    for (int32_t node = first; node < args.first_node[request + 1]; ++node) {
      const bool is_checked = node > first && is_same(args.context[node], args.context[node - 1]) &&
                              args.first_row[node - 1] < args.first_row[node];
      if (!is_checked && args.first_row[node] < args.first_row[node + 1]) {
        check_context(args, request, node);
      }
    }
  }
}

// Arguments that have their layout.
DraftGraphAttentionArgs layout_args(const Tensor& page_table, const Tensor& first_node, const Tensor& first_row,
                                    const Tensor& context, const Tensor& is_causal,
                                    const std::optional<Tensor>& tiles) {
  DraftGraphAttentionArgs args = {};
  args.page_table = page_table.const_data_ptr<int32_t>();
  args.first_node = first_node.const_data_ptr<int32_t>();
  args.first_row = first_row.const_data_ptr<int32_t>();
  args.context = reinterpret_cast<const Context*>(context.const_data_ptr<int32_t>());
  args.is_causal = is_causal.const_data_ptr<int32_t>();
  args.tiles = tiles.has_value() ? reinterpret_cast<const QueryTile*>(tiles->const_data_ptr<int32_t>()) : nullptr;
  args.page_table_stride = page_table.stride(0);
  args.num_requests = static_cast<int32_t>(page_table.size(0));
  args.num_nodes = static_cast<int32_t>(context.size(0));
  args.max_pages = static_cast<int32_t>(page_table.size(1));
  args.num_tiles = tiles.has_value() ? static_cast<int32_t>(tiles->size(0)) : 0;
  return args;
}

RowStrides row_strides(const Tensor& tensor) { return {.row = tensor.stride(0), .head = tensor.stride(1)}; }

}  // namespace

void draft_graph_attention(Tensor query, Tensor key, Tensor value, Tensor kv_cache, Tensor page_table,
                           Tensor first_node, Tensor first_row, Tensor context, Tensor is_causal, double scale,
                           Tensor out, std::optional<Tensor> lse, std::optional<Tensor> tiles, int64_t num_splits) {
  const FloatType type = float_type(kOp, "query", query);
  check_dims(kOp, "query", query, 3, "[num_rows, num_heads, head_dim]");
  check_dims(kOp, "key", key, 3, "[num_rows, num_kv_heads, head_dim]");
  check_dims(kOp, "kv_cache", kv_cache, 4, "[num_pages, num_kv_heads, page_size, 2 * head_dim]");
  check_dims(kOp, "page_table", page_table, 2, "[num_requests, max_pages]");
  check_dims(kOp, "context", context, 2, "[num_nodes, 4]");
  const int64_t num_rows = query.size(0);
  const int64_t num_heads = query.size(1);
  const int64_t head_dim = query.size(2);
  const int64_t num_kv_heads = key.size(1);
  const int64_t page_size = kv_cache.size(2);
  const int64_t num_requests = page_table.size(0);
  const int64_t num_nodes = context.size(0);
  check(head_dim >= 32 && head_dim <= 256 && head_dim % 8 == 0, kOp, "head_dim is ", head_dim,
        ", allowed are multiples of 8 from 32 to 256; choose another attention for this model");
  check(num_kv_heads > 0 && num_heads % num_kv_heads == 0, kOp, "query has ", num_heads, " heads and key ",
        num_kv_heads, ", which must divide them; give the heads of one layer");
  check(page_size >= 16 && page_size <= 256, kOp, "page_size is ", page_size,
        ", allowed are 16 to 256; set vLLM's block_size");
  check(std::isnormal(static_cast<float>(scale)) && scale > 0, kOp, "scale is ", scale,
        ", it must be positive and finite; give 1 / sqrt(head_dim) or the model's own");
  const ScalarType numbers = query.scalar_type();
  check_argument("query", query, {num_rows, num_heads, head_dim}, numbers, query);
  check_argument("key", key, {num_rows, num_kv_heads, head_dim}, numbers, query);
  check_argument("value", value, {num_rows, num_kv_heads, head_dim}, numbers, query);
  check_argument("kv_cache", kv_cache, {kv_cache.size(0), num_kv_heads, page_size, 2 * head_dim}, numbers, query);
  check_argument("out", out, {num_rows, num_heads, head_dim}, numbers, query);
  check_argument("page_table", page_table, {num_requests, page_table.size(1)}, ScalarType::Int, query);
  check_argument("first_node", first_node, {num_requests + 1}, ScalarType::Int, query);
  check_argument("first_row", first_row, {num_nodes + 1}, ScalarType::Int, query);
  check_argument("context", context, {num_nodes, 2 * kContextIntervals}, ScalarType::Int, query);
  check_contiguous(kOp, "context", context);
  check_argument("is_causal", is_causal, {num_nodes}, ScalarType::Int, query);
  if (lse.has_value()) {
    check_argument("lse", *lse, {num_rows, num_heads}, ScalarType::Float, query);
    check_contiguous(kOp, "lse", *lse);
  }
  constexpr int64_t kTileFields = sizeof(QueryTile) / sizeof(int32_t);
  const bool is_cuda = kRunsCudaOnCpu || query.is_cuda();
  check(tiles.has_value() || !is_cuda, kOp,
        "tiles are missing, on CUDA they say which CTA takes which queries; give what ",
        "attention.tiles.query_tiles makes of the layout");
  if (tiles.has_value()) {
    check_argument("tiles", *tiles, {tiles->size(0), kTileFields}, ScalarType::Int, query);
    check_contiguous(kOp, "tiles", *tiles);
    check(!is_cuda || num_rows == 0 || tiles->size(0) > 0, kOp, "tiles has none, and query has ", num_rows,
          " rows, which no CTA would take; give what attention.tiles.query_tiles makes of the layout, or do not call");
  }
  check(num_splits >= 1 && num_splits <= kMaxSplits, kOp, "num_splits is ", num_splits, ", allowed are 1 to ",
        kMaxSplits, "; give what attention.tiles.num_splits chooses");
  DraftGraphAttentionArgs args = layout_args(page_table, first_node, first_row, context, is_causal, tiles);
  args.type = type;
  args.query = query.const_data_ptr();
  args.key = key.const_data_ptr();
  args.value = value.const_data_ptr();
  args.kv_cache = kv_cache.const_data_ptr();
  args.out = out.mutable_data_ptr();
  args.lse = lse.has_value() ? lse->mutable_data_ptr<float>() : nullptr;
  args.query_strides = row_strides(query);
  args.key_strides = row_strides(key);
  args.value_strides = row_strides(value);
  args.out_strides = row_strides(out);
  args.cache_page_stride = kv_cache.stride(0);
  args.cache_head_stride = kv_cache.stride(1);
  args.cache_position_stride = kv_cache.stride(2);
  args.scale = static_cast<float>(scale);
  args.num_rows = static_cast<int32_t>(num_rows);
  args.num_pages = static_cast<int32_t>(kv_cache.size(0));
  args.page_size = static_cast<int32_t>(page_size);
  args.num_heads = static_cast<int32_t>(num_heads);
  args.num_kv_heads = static_cast<int32_t>(num_kv_heads);
  args.head_dim = static_cast<int32_t>(head_dim);
  args.num_splits = static_cast<int32_t>(num_splits);
  if (query.is_cpu()) {
    check_values(args);
    if (is_cuda) {
      check_tiles(args);
    }
  }
  std::optional<Tensor> workspace;
  if (is_cuda) {
    for (const auto& [name, tensor] :
         {std::pair("query", query), {"key", key}, {"value", value}, {"kv_cache", kv_cache}, {"out", out}}) {
      check_aligned(name, tensor);
    }
    workspace = torch::stable::new_empty(query, {attention_workspace(args)}, ScalarType::Float);
    args.workspace = workspace->mutable_data_ptr<float>();
  }
  DLLM_KERNEL(draft_graph_attention).launch(query, args);
}

// Check a layout whose tensors are copies on the CPU: what the op does itself where that costs no synchronisation.
void draft_graph_attention_check(Tensor page_table, Tensor first_node, Tensor first_row, Tensor context,
                                 Tensor is_causal, Tensor tiles, int64_t num_rows, int64_t num_pages, int64_t page_size,
                                 int64_t heads_per_kv) {
  DraftGraphAttentionArgs args = layout_args(page_table, first_node, first_row, context, is_causal, tiles);
  args.num_rows = static_cast<int32_t>(num_rows);
  args.num_pages = static_cast<int32_t>(num_pages);
  args.page_size = static_cast<int32_t>(page_size);
  args.num_heads = static_cast<int32_t>(heads_per_kv);
  args.num_kv_heads = 1;
  check_values(args);
  if (args.num_tiles > 0) {
    check_tiles(args);
  }
}

}  // namespace dllm

STABLE_TORCH_LIBRARY_FRAGMENT(DLLM_LIBRARY, m) {
  m.def(
      "draft_graph_attention_check(Tensor page_table, Tensor first_node, Tensor first_row, Tensor context, Tensor "
      "is_causal, Tensor tiles, int num_rows, int num_pages, int page_size, int heads_per_kv) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(DLLM_LIBRARY, CPU, m) {
  m.impl("draft_graph_attention_check", TORCH_BOX(&dllm::draft_graph_attention_check));
}

DLLM_OP(draft_graph_attention,
        "(Tensor query, Tensor key, Tensor value, Tensor kv_cache, Tensor page_table, Tensor first_node, "
        "Tensor first_row, Tensor context, Tensor is_causal, float scale, Tensor(a!) out, Tensor(b!)? lse=None, "
        "Tensor? tiles=None, int num_splits=1) -> ()")
