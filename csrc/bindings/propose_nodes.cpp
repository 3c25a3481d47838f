#include "dllm/propose_nodes.h"

#include <vector>

#include "library.h"

namespace dllm {
namespace {

constexpr const char* kOp = "propose_nodes";

void check_input(const char* name, const Tensor& tensor, ScalarType type, const Sizes& sizes, const Tensor& canvas) {
  check_shape(kOp, name, tensor, sizes, "sizes follow from roots.canvas, roots.token_ids and graph.nodes");
  check_tensor(kOp, name, tensor, type, canvas);
}

void check_graph(const std::vector<Tensor>& graph, const Tensor& canvas) {
  check_count(kOp, "graph", graph, 3, "the fields of draft.compile.PackedGraph");
  const Sizes num_nodes = {graph[0].dim() == 0 ? 0 : graph[0].size(0)};
  check_input("graph.nodes", graph[0], ScalarType::Int, {num_nodes[0], 5}, canvas);
  check_input("graph.pairs", graph[1], ScalarType::Int, {graph[1].dim() == 0 ? 0 : graph[1].size(0), 2}, canvas);
  check_input("graph.log_correction", graph[2], ScalarType::Double, num_nodes, canvas);
}

// Check the numbers of a graph, which tell the kernel where to read.
void check_values(const ProposeNodesArgs& args, int64_t num_pairs) {
  for (int32_t i = 0; i < args.num_nodes; ++i) {
    const GraphNode& node = args.nodes[i];
    const int32_t first_pair = i == 0 ? 0 : args.nodes[i - 1].end_pair;
    check(0 <= node.parent && node.parent <= i && first_pair <= node.end_pair && node.end_pair <= num_pairs, kOp,
          "graph.nodes[", i, "] has parent ", node.parent, " and end_pair ", node.end_pair, ", allowed are 0..", i,
          " and ", first_pair, "..", num_pairs, "; pack the graph with draft.compile");
  }
  for (int64_t i = 0; i < num_pairs; ++i) {
    const GraphPair& pair = args.pairs[i];
    check(pair.position_rank >= 0 && 0 <= pair.vocab_rank && pair.vocab_rank < args.num_vocab_ranks, kOp,
          "graph.pairs[", i, "] is [", pair.position_rank, ", ", pair.vocab_rank, "], allowed are [0 or more, 0..",
          args.num_vocab_ranks - 1, "]; pack the graph with draft.compile");
  }
}

void check_roots(const std::vector<Tensor>& roots, int64_t num_vocab_ranks) {
  check_count(kOp, "roots", roots, 5, "canvas, is_masked, is_new, token_ids and log_probs");
  const Tensor& canvas = roots[0];
  check(canvas.dim() == 2, kOp, "roots.canvas must be [num_reqs, block_length], got ", shape(canvas),
        "; give one canvas for each request");
  const int64_t num_candidates = roots[3].dim() == 3 ? roots[3].size(2) : 0;
  check(num_vocab_ranks >= 1 && num_vocab_ranks <= num_candidates && num_candidates <= kMaxCandidates, kOp,
        "roots.token_ids must be [num_reqs, block_length, num_candidates] with num_candidates in ", num_vocab_ranks,
        "..", kMaxCandidates, ", got ", shape(roots[3]), "; keep as many as the graph has vocab ranks");
  const Sizes positions = {canvas.size(0), canvas.size(1)};
  const Sizes candidates = {canvas.size(0), canvas.size(1), num_candidates};
  check_input("roots.canvas", canvas, ScalarType::Long, positions, canvas);
  check_input("roots.is_masked", roots[1], ScalarType::Bool, positions, canvas);
  check_input("roots.is_new", roots[2], ScalarType::Bool, positions, canvas);
  check_input("roots.token_ids", roots[3], ScalarType::Long, candidates, canvas);
  check_input("roots.log_probs", roots[4], ScalarType::Double, candidates, canvas);
}

void check_noise(const std::vector<Tensor>& noise, const Tensor& canvas) {
  if (noise.empty()) {
    return;
  }
  check_count(kOp, "draft_noise", noise, 6, "the fields of draft.propose.DraftNoise, or none for greedy requests");
  const Sizes requests = {canvas.size(0)};
  check_input("draft_noise.seed", noise[0], ScalarType::Long, requests, canvas);
  check_input("draft_noise.position", noise[1], ScalarType::Long, {canvas.size(0), canvas.size(1)}, canvas);
  check_input("draft_noise.temperature", noise[2], ScalarType::Double, requests, canvas);
  check_input("draft_noise.top_k", noise[3], ScalarType::Long, requests, canvas);
  check_input("draft_noise.top_p", noise[4], ScalarType::Double, requests, canvas);
  check_input("draft_noise.is_random", noise[5], ScalarType::Bool, requests, canvas);
}

template <typename T>
const T* data_or_null(const std::vector<Tensor>& tensors, size_t index) {
  return tensors.empty() ? nullptr : tensors[index].const_data_ptr<T>();
}

}  // namespace

std::vector<Tensor> propose_nodes(std::vector<Tensor> graph, std::vector<double> readiness, std::vector<Tensor> roots,
                                  std::vector<Tensor> draft_noise, bool is_one_by_one, int64_t num_vocab_ranks,
                                  int64_t num_drafts) {
  check_roots(roots, num_vocab_ranks);
  const Tensor& canvas = roots[0];
  check_graph(graph, canvas);
  check_noise(draft_noise, canvas);
  check(readiness.size() == 4, kOp, "readiness must be 4 numbers, got ", readiness.size(),
        "; give slope, near[0], near[1] and bias");
  const int64_t num_nodes = graph[0].size(0);
  check(num_drafts >= 0 && num_drafts <= num_nodes, kOp, "num_drafts is ", num_drafts, ", the graph has ", num_nodes,
        " nodes; choose 0..", num_nodes);
  const Sizes drafts = {canvas.size(0), num_drafts};
  std::vector<Tensor> out = {
      torch::stable::new_empty(canvas, {canvas.size(0), num_drafts, canvas.size(1)}, ScalarType::Long),
      torch::stable::new_empty(canvas, drafts, ScalarType::Bool),
      torch::stable::new_empty(canvas, drafts, ScalarType::Long),
      torch::stable::new_empty(canvas, drafts, ScalarType::Long),
      torch::stable::new_empty(canvas, drafts, ScalarType::Double),
  };
  const ProposeNodesArgs args = {
      .nodes = reinterpret_cast<const GraphNode*>(graph[0].const_data_ptr<int32_t>()),
      .pairs = reinterpret_cast<const GraphPair*>(graph[1].const_data_ptr<int32_t>()),
      .log_correction = graph[2].const_data_ptr<double>(),
      .readiness = {readiness[0], {readiness[1], readiness[2]}, readiness[3]},
      .is_one_by_one = is_one_by_one,
      .canvas = canvas.const_data_ptr<int64_t>(),
      .is_masked = roots[1].const_data_ptr<bool>(),
      .is_new = roots[2].const_data_ptr<bool>(),
      .token_ids = roots[3].const_data_ptr<int64_t>(),
      .log_probs = roots[4].const_data_ptr<double>(),
      .seed = data_or_null<int64_t>(draft_noise, 0),
      .position = data_or_null<int64_t>(draft_noise, 1),
      .temperature = data_or_null<double>(draft_noise, 2),
      .top_k = data_or_null<int64_t>(draft_noise, 3),
      .top_p = data_or_null<double>(draft_noise, 4),
      .is_random = data_or_null<bool>(draft_noise, 5),
      .out_canvas = out[0].mutable_data_ptr<int64_t>(),
      .out_is_valid = out[1].mutable_data_ptr<bool>(),
      .out_node = out[2].mutable_data_ptr<int64_t>(),
      .out_depth = out[3].mutable_data_ptr<int64_t>(),
      .out_log_reach = out[4].mutable_data_ptr<double>(),
      .num_reqs = canvas.size(0),
      .block_length = static_cast<int32_t>(canvas.size(1)),
      .num_nodes = static_cast<int32_t>(num_nodes),
      .num_drafts = static_cast<int32_t>(num_drafts),
      .num_candidates = static_cast<int32_t>(roots[3].size(2)),
      .num_vocab_ranks = static_cast<int32_t>(num_vocab_ranks),
  };
  if (canvas.is_cpu()) {
    check_values(args, graph[1].size(0));
  }
  DLLM_KERNEL(propose_nodes).launch(canvas, args);
  return out;
}

}  // namespace dllm

DLLM_OP(propose_nodes,
        "(Tensor[] graph, float[] readiness, Tensor[] roots, Tensor[] draft_noise, bool is_one_by_one, "
        "int num_vocab_ranks, int num_drafts) -> Tensor[]")
