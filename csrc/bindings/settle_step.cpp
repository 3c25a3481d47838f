#include "dllm/settle_step.h"

#include <vector>

#include "library.h"

namespace dllm {
namespace {

constexpr const char* kOp = "settle_step";

struct Input {
  const char* name;
  ScalarType type;
  Sizes sizes;
};

void check_inputs(const char* name, const char* names, const std::vector<Tensor>& tensors,
                  const std::vector<Input>& inputs, const Tensor& first) {
  check_count(kOp, name, tensors, inputs.size(), names);
  for (size_t i = 0; i < inputs.size(); ++i) {
    check_shape(kOp, inputs[i].name, tensors[i], inputs[i].sizes, "sizes follow from nodes.canvas and stores.canvas");
    check_tensor(kOp, inputs[i].name, tensors[i], inputs[i].type, first);
  }
}

bool has_memory(const std::vector<Tensor>& done) { return done.size() > 9; }

void check_nodes(const std::vector<Tensor>& nodes) {
  check(!nodes.empty() && nodes[0].dim() == 3 && nodes[0].size(1) > 0, kOp,
        "nodes must begin with canvas [num_reqs, num_nodes, block_length] with the root; give it first");
  const Tensor& canvas = nodes[0];
  const Sizes each = {canvas.size(0), canvas.size(1)};
  check_inputs("nodes", "canvas, is_valid and depth", nodes,
               {{"nodes.canvas", ScalarType::Long, {each[0], each[1], canvas.size(2)}},
                {"nodes.is_valid", ScalarType::Bool, each},
                {"nodes.depth", ScalarType::Long, each}},
               canvas);
}

void check_done(const std::vector<Tensor>& done, const Tensor& canvas) {
  const int64_t num_reqs = canvas.size(0);
  const Sizes positions = {num_reqs, canvas.size(2)};
  const Sizes credited = {num_reqs, canvas.size(2), kMaxCredited};
  const Sizes candidates = {num_reqs, canvas.size(2), done.size() > 7 && done[7].dim() == 3 ? done[7].size(2) : 0};
  std::vector<Input> inputs = {
      {"done.canvas", ScalarType::Long, positions},        {"done.next_canvas", ScalarType::Long, positions},
      {"done.node", ScalarType::Long, {num_reqs}},         {"done.num_steps", ScalarType::Long, {num_reqs}},
      {"done.num_unmasked", ScalarType::Long, {num_reqs}}, {"done.is_finished", ScalarType::Bool, {num_reqs}},
      {"done.came_over", ScalarType::Bool, {num_reqs}},    {"done.token_ids", ScalarType::Long, candidates},
      {"done.log_probs", ScalarType::Double, candidates}};
  if (has_memory(done)) {
    inputs.push_back({"done.credit_ids", ScalarType::Long, credited});
    inputs.push_back({"done.credits", ScalarType::Double, credited});
  }
  check_inputs("done",
               "canvas, next_canvas, node, num_steps, num_unmasked, is_finished, came_over, token_ids and log_probs of "
               "the candidates and, if a policy remembers something, credit_ids and credits",
               done, inputs, canvas);
}

void check_requests(const std::vector<Tensor>& requests, const Tensor& canvas) {
  const Sizes each = {canvas.size(0)};
  std::vector<Input> inputs = {{"requests.slots", ScalarType::Long, each},
                               {"requests.start", ScalarType::Long, each},
                               {"requests.num_known", ScalarType::Long, each},
                               {"requests.num_counted", ScalarType::Long, each}};
  if (requests.size() > 4) {
    inputs.push_back({"requests.planned", ScalarType::Long, {3, canvas.size(0)}});
  }
  check_inputs("requests", "slots, start, num_known, num_counted and, if the step stores something, planned", requests,
               inputs, canvas);
}

// Stores are the canvas, then those of drafts if there are any, then those of a memory.
void check_stores(const std::vector<Tensor>& stores, bool has_memory, int64_t num_candidates, const Tensor& canvas) {
  const int64_t num_slots = !stores.empty() && stores[0].dim() == 2 ? stores[0].size(0) : 0;
  const Sizes positions = {num_slots, canvas.size(2)};
  std::vector<Input> inputs = {{"stores.canvas", ScalarType::Long, positions}};
  if (stores.size() > (has_memory ? 3 : 1)) {
    const Sizes candidates = {num_slots, canvas.size(2), num_candidates};
    inputs.push_back({"stores.token_ids", ScalarType::Long, candidates});
    inputs.push_back({"stores.log_probs", ScalarType::Double, candidates});
    inputs.push_back({"stores.was_masked", ScalarType::Bool, positions});
    inputs.push_back({"stores.is_known", ScalarType::Bool, {num_slots}});
  }
  if (has_memory) {
    const Sizes credited = {num_slots, canvas.size(2), kMaxCredited};
    inputs.push_back({"stores.credit_ids", ScalarType::Long, credited});
    inputs.push_back({"stores.credits", ScalarType::Double, credited});
  }
  check_inputs("stores",
               "the slots' canvas, if something is drafted token_ids, log_probs, was_masked and is_known, and of a "
               "memory in `done` credit_ids and credits",
               stores, inputs, canvas);
}

void check_ends(const std::vector<Tensor>& ends, const Tensor& store, const Tensor& canvas) {
  const int64_t num_ids = !ends.empty() && ends[0].dim() == 2 ? ends[0].size(1) : 0;
  check_inputs(
      "ends", "ids and bounds by slot", ends,
      {{"ends.ids", ScalarType::Long, {store.size(0), num_ids}}, {"ends.bounds", ScalarType::Long, {2, store.size(0)}}},
      canvas);
}

template <typename Value>
const Value* maybe(const std::vector<Tensor>& tensors, size_t index, bool is_there) {
  return is_there ? tensors[index].const_data_ptr<Value>() : nullptr;
}

template <typename Value>
Value* maybe_written(const std::vector<Tensor>& tensors, size_t index, bool is_there) {
  return is_there ? tensors[index].mutable_data_ptr<Value>() : nullptr;
}

}  // namespace

std::vector<Tensor> settle_step(std::vector<Tensor> nodes, std::vector<Tensor> done, std::vector<Tensor> requests,
                                std::vector<Tensor> stores, std::vector<Tensor> ends, int64_t num_batch,
                                int64_t report_len, int64_t mask_token_id) {
  check_nodes(nodes);
  const Tensor& canvas = nodes[0];
  check_done(done, canvas);
  check_requests(requests, canvas);
  const int64_t num_candidates = done[7].size(2);
  const bool remembers = has_memory(done);
  check_stores(stores, remembers, num_candidates, canvas);
  check_ends(ends, stores[0], canvas);
  const bool drafts = stores.size() > 4;
  const size_t memory = drafts ? 5 : 1;
  check(num_batch >= canvas.size(0), kOp, "num_batch must be ", canvas.size(0), " or more, got ", num_batch,
        "; count the whole batch");
  check(report_len > kProposed, kOp, "report_len must be above ", static_cast<int64_t>(kProposed), ", got ", report_len,
        "; drafts are counted behind");
  std::vector<Tensor> out = {
      torch::stable::new_empty(canvas, {num_batch, canvas.size(2)}, ScalarType::Int),
      torch::stable::new_empty(canvas, {num_batch}, ScalarType::Int),
      torch::stable::new_empty(canvas, {num_batch}, ScalarType::Int),
      torch::stable::new_empty(canvas, {num_batch, report_len}, ScalarType::Int),
  };
  const SettleStepArgs args = {
      .canvas = canvas.const_data_ptr<int64_t>(),
      .is_valid = nodes[1].const_data_ptr<bool>(),
      .depth = nodes[2].const_data_ptr<int64_t>(),
      .after = done[0].const_data_ptr<int64_t>(),
      .next_canvas = done[1].const_data_ptr<int64_t>(),
      .node = done[2].const_data_ptr<int64_t>(),
      .num_steps = done[3].const_data_ptr<int64_t>(),
      .num_unmasked = done[4].const_data_ptr<int64_t>(),
      .is_finished = done[5].const_data_ptr<bool>(),
      .came_over = done[6].const_data_ptr<bool>(),
      .ids = done[7].const_data_ptr<int64_t>(),
      .log_probs = done[8].const_data_ptr<double>(),
      .credit_ids = maybe<int64_t>(done, 9, remembers),
      .credits = maybe<double>(done, 10, remembers),
      .slots = requests[0].const_data_ptr<int64_t>(),
      .start = requests[1].const_data_ptr<int64_t>(),
      .num_known = requests[2].const_data_ptr<int64_t>(),
      .num_counted = requests[3].const_data_ptr<int64_t>(),
      .planned = maybe<int64_t>(requests, 4, requests.size() > 4),
      .end_ids = ends[0].const_data_ptr<int64_t>(),
      .end_bounds = ends[1].const_data_ptr<int64_t>(),
      .slot_canvas = stores[0].mutable_data_ptr<int64_t>(),
      .slot_ids = maybe_written<int64_t>(stores, 1, drafts),
      .slot_log_probs = maybe_written<double>(stores, 2, drafts),
      .slot_was_masked = maybe_written<bool>(stores, 3, drafts),
      .slot_is_known = maybe_written<bool>(stores, 4, drafts),
      .slot_credit_ids = maybe_written<int64_t>(stores, memory, remembers),
      .slot_credits = maybe_written<double>(stores, memory + 1, remembers),
      .out_sampled = out[0].mutable_data_ptr<int32_t>(),
      .out_num_sampled = out[1].mutable_data_ptr<int32_t>(),
      .out_num_rejected = out[2].mutable_data_ptr<int32_t>(),
      .out_report = out[3].mutable_data_ptr<int32_t>(),
      .num_batch = num_batch,
      .num_reqs = canvas.size(0),
      .num_nodes = canvas.size(1),
      .block_length = canvas.size(2),
      .num_candidates = num_candidates,
      .num_slots = stores[0].size(0),
      .num_end_ids = ends[0].size(1),
      .report_len = report_len,
      .mask_token_id = mask_token_id,
  };
  DLLM_KERNEL(settle_step).launch(canvas, args);
  return out;
}

}  // namespace dllm

DLLM_OP(settle_step,
        "(Tensor[] nodes, Tensor[] done, Tensor[] requests, Tensor(a!)[] stores, Tensor[] ends, int num_batch, "
        "int report_len, int mask_token_id) -> Tensor[]")
