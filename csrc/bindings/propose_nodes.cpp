#include "dllm/propose_nodes.h"

#include <vector>

#include "library.h"

namespace dllm {
namespace {

constexpr const char* kOp = "propose_nodes";

void check_input(const char* name, const Tensor& tensor, ScalarType type, const Sizes& sizes, const Tensor& canvas) {
  check_shape(kOp, name, tensor, sizes,
              "sizes follow from requests.slots, state.canvas, state.token_ids and graph.nodes");
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

void check_requests(const std::vector<Tensor>& requests, const std::vector<Tensor>& state) {
  const size_t count = requests.size() == 3 ? 3 : 2;
  check_count(kOp, "requests", requests, count, "slots and start, and with a ranker terms");
  check(!state.empty() && state[0].dim() == 2, kOp,
        "state must begin with canvas [num_slots, block_length]; give one canvas for each slot");
  check(requests[0].dim() == 1, kOp, "requests.slots must be [num_reqs], got ", shape(requests[0]),
        "; give one slot for each request");
  check_input("requests.slots", requests[0], ScalarType::Long, {requests[0].size(0)}, state[0]);
  check_input("requests.start", requests[1], ScalarType::Long, {requests[0].size(0)}, state[0]);
  if (count == 3) {
    check_input("requests.terms", requests[2], ScalarType::Double,
                {requests[0].size(0), state[0].size(1), 1 + 2 * kReach}, state[0]);
  }
}

void check_state(const std::vector<Tensor>& state, int64_t num_vocab_ranks) {
  check_count(kOp, "state", state, 6, "canvas, token_ids, log_probs, was_masked, is_known and seq_len");
  const Tensor& canvas = state[0];
  const int64_t num_candidates = state[1].dim() == 3 ? state[1].size(2) : 0;
  check(num_vocab_ranks >= 1 && num_vocab_ranks <= num_candidates && num_candidates <= kMaxCandidates, kOp,
        "state.token_ids must be [num_slots, block_length, num_candidates] with num_candidates in ", num_vocab_ranks,
        "..", kMaxCandidates, ", got ", shape(state[1]), "; keep as many as the graph has vocab ranks");
  const Sizes slots = {canvas.size(0)};
  const Sizes positions = {canvas.size(0), canvas.size(1)};
  const Sizes candidates = {canvas.size(0), canvas.size(1), num_candidates};
  check_input("state.canvas", canvas, ScalarType::Long, positions, canvas);
  check_input("state.token_ids", state[1], ScalarType::Long, candidates, canvas);
  check_input("state.log_probs", state[2], ScalarType::Double, candidates, canvas);
  check_input("state.was_masked", state[3], ScalarType::Bool, positions, canvas);
  check_input("state.is_known", state[4], ScalarType::Bool, slots, canvas);
  check_input("state.seq_len", state[5], ScalarType::Long, slots, canvas);
}

void check_params(const std::vector<Tensor>& params, const Tensor& canvas) {
  if (params.empty()) {
    return;
  }
  check_count(kOp, "params", params, 5, "policy, seed, top_k, temperature and top_p, or none for greedy requests");
  const char* const names[] = {"params.policy", "params.seed", "params.top_k", "params.temperature", "params.top_p"};
  for (size_t i = 0; i < params.size(); ++i) {
    check_input(names[i], params[i], i < 3 ? ScalarType::Long : ScalarType::Double, {canvas.size(0)}, canvas);
  }
}

void check_slots(const Tensor& slots, int64_t num_slots) {
  for (int64_t i = 0; i < slots.size(0); ++i) {
    const int64_t slot = slots.const_data_ptr<int64_t>()[i];
    check(0 <= slot && slot < num_slots, kOp, "requests.slots[", i, "] is ", slot, ", allowed are 0..", num_slots - 1,
          "; give the slots of the requests");
  }
}

template <typename T>
const T* data_or_null(const std::vector<Tensor>& tensors, size_t index) {
  return tensors.empty() ? nullptr : tensors[index].const_data_ptr<T>();
}

}  // namespace

std::vector<Tensor> propose_nodes(std::vector<Tensor> graph, std::vector<double> weights, std::vector<Tensor> requests,
                                  std::vector<Tensor> state, std::vector<Tensor> params, bool is_one_by_one,
                                  int64_t num_vocab_ranks, int64_t num_drafts, bool looks_ahead, int64_t mask_token_id,
                                  int64_t sub_block_length) {
  check_requests(requests, state);
  check_state(state, num_vocab_ranks);
  const Tensor& canvas = state[0];
  check_graph(graph, canvas);
  check_params(params, canvas);
  check(sub_block_length >= 0, kOp, "sub_block_length must be 0 or more, got ", sub_block_length, "; 0 is none");
  const bool has_token_weights = weights.size() == 10;
  check(weights.size() == 4 || has_token_weights, kOp, "weights must be 4 or 10 numbers, got ", weights.size(),
        "; give slope, near[0], near[1] and bias, and with token weights slope, slope_beside_new and same[0..3]");
  const int64_t num_nodes = graph[0].size(0);
  check(num_drafts >= 0 && num_drafts <= num_nodes, kOp, "num_drafts is ", num_drafts, ", the graph has ", num_nodes,
        " nodes; choose 0..", num_nodes);
  const int64_t num_reqs = requests[0].size(0);
  const int64_t num_canvases = 1 + num_drafts + looks_ahead;
  const Sizes tokens = {num_reqs, num_canvases, canvas.size(1)};
  std::vector<Tensor> out = {
      torch::stable::new_empty(canvas, tokens, ScalarType::Long),
      torch::stable::new_empty(canvas, tokens, ScalarType::Bool),
      torch::stable::new_empty(canvas, {num_reqs, num_canvases}, ScalarType::Bool),
      torch::stable::new_empty(canvas, {num_reqs, num_canvases}, ScalarType::Long),
      torch::stable::new_empty(canvas, {num_reqs, num_drafts}, ScalarType::Long),
      torch::stable::new_empty(canvas, {num_reqs, num_drafts}, ScalarType::Double),
  };
  if (looks_ahead) {
    out.push_back(torch::stable::new_empty(canvas, {num_reqs, canvas.size(1)}, ScalarType::Long));
  }
  TokenWeights token_weights = {};
  if (has_token_weights) {
    token_weights = {weights[4], weights[5], {weights[6], weights[7], weights[8], weights[9]}};
  }
  const ProposeNodesArgs args = {
      .nodes = reinterpret_cast<const GraphNode*>(graph[0].const_data_ptr<int32_t>()),
      .pairs = reinterpret_cast<const GraphPair*>(graph[1].const_data_ptr<int32_t>()),
      .log_correction = graph[2].const_data_ptr<double>(),
      .readiness = {weights[0], {weights[1], weights[2]}, weights[3]},
      .token_weights = token_weights,
      .has_token_weights = has_token_weights,
      .is_one_by_one = is_one_by_one,
      .slots = requests[0].const_data_ptr<int64_t>(),
      .start = requests[1].const_data_ptr<int64_t>(),
      .terms = requests.size() == 3 ? requests[2].const_data_ptr<double>() : nullptr,
      .canvas = canvas.const_data_ptr<int64_t>(),
      .token_ids = state[1].const_data_ptr<int64_t>(),
      .log_probs = state[2].const_data_ptr<double>(),
      .was_masked = state[3].const_data_ptr<bool>(),
      .is_known = state[4].const_data_ptr<bool>(),
      .seq_len = state[5].const_data_ptr<int64_t>(),
      .policy = data_or_null<int64_t>(params, 0),
      .seed = data_or_null<int64_t>(params, 1),
      .top_k = data_or_null<int64_t>(params, 2),
      .temperature = data_or_null<double>(params, 3),
      .top_p = data_or_null<double>(params, 4),
      .out_canvas = out[0].mutable_data_ptr<int64_t>(),
      .out_is_masked = out[1].mutable_data_ptr<bool>(),
      .out_is_valid = out[2].mutable_data_ptr<bool>(),
      .out_depth = out[3].mutable_data_ptr<int64_t>(),
      .out_node = out[4].mutable_data_ptr<int64_t>(),
      .out_log_reach = out[5].mutable_data_ptr<double>(),
      .out_end = looks_ahead ? out[6].mutable_data_ptr<int64_t>() : nullptr,
      .num_reqs = num_reqs,
      .mask_token_id = mask_token_id,
      .sub_block_length = sub_block_length,
      .num_canvases = static_cast<int32_t>(num_canvases),
      .block_length = static_cast<int32_t>(canvas.size(1)),
      .num_nodes = static_cast<int32_t>(num_nodes),
      .num_drafts = static_cast<int32_t>(num_drafts),
      .num_candidates = static_cast<int32_t>(state[1].size(2)),
      .num_vocab_ranks = static_cast<int32_t>(num_vocab_ranks),
  };
  if (canvas.is_cpu()) {
    check_values(args, graph[1].size(0));
    check_slots(requests[0], canvas.size(0));
  }
  DLLM_KERNEL(propose_nodes).launch(canvas, args);
  return out;
}

}  // namespace dllm

DLLM_OP(propose_nodes,
        "(Tensor[] graph, float[] weights, Tensor[] requests, Tensor[] state, Tensor[] params, bool is_one_by_one, "
        "int num_vocab_ranks, int num_drafts, bool looks_ahead, int mask_token_id, int sub_block_length) "
        "-> Tensor[]")
