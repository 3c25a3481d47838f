#include "dllm/decide_walk.h"

#include <optional>
#include <vector>

#include "library.h"

namespace dllm {
namespace {

constexpr const char* kOp = "decide_walk";

// How many rows there must be: of all nodes, or of those that are evaluated, which must be whole ones, and no more.
int64_t count_rows(const Tensor& canvas, const std::optional<Tensor>& evaluated, const std::vector<Tensor>& rows) {
  const int64_t num_rows = canvas.size(0) * canvas.size(1) * canvas.size(2);
  if (!evaluated || rows.empty() || rows[0].dim() != 1 || canvas.size(2) == 0) {
    return num_rows;
  }
  const int64_t given = rows[0].size(0);
  return given % canvas.size(2) == 0 && given < num_rows ? given : num_rows;
}

void check_input(const char* name, const Tensor& tensor, ScalarType type, const Sizes& sizes, const Tensor& canvas) {
  check_shape(kOp, name, tensor, sizes, "sizes follow from canvas and rows.top_ids");
  check_tensor(kOp, name, tensor, type, canvas);
}

void check_rows(const std::vector<Tensor>& rows, const Tensor& canvas, int64_t num_rows) {
  check(rows.size() == 6 || rows.size() == 8, kOp, "rows must be 6 or 8 tensors, got ", rows.size(),
        "; give token_ids, token_logits, top_ids, top_logits, rest, weighted and, if wanted, the sampled sums");
  const int64_t num_candidates = rows[2].dim() == 2 ? rows[2].size(1) : 0;
  check(num_candidates >= 2 && num_candidates <= kMaxCandidates, kOp,
        "rows.top_ids must be [num_rows, num_candidates] with num_candidates in 2..", kMaxCandidates, ", got ",
        shape(rows[2]), "; `margin` compares two");
  check_input("rows.token_ids", rows[0], ScalarType::Long, {num_rows}, canvas);
  check_input("rows.token_logits", rows[1], ScalarType::Float, {num_rows}, canvas);
  check_input("rows.top_ids", rows[2], ScalarType::Long, {num_rows, num_candidates}, canvas);
  check_input("rows.top_logits", rows[3], ScalarType::Float, {num_rows, num_candidates}, canvas);
  const char* const sums[] = {"rows.rest", "rows.weighted", "rows.sampled_rest", "rows.sampled_weighted"};
  for (size_t i = 4; i < rows.size(); ++i) {
    check_input(sums[i - 4], rows[i], ScalarType::Double, {num_rows}, canvas);
  }
}

void check_params(const std::vector<Tensor>& params, const Tensor& canvas) {
  check_count(kOp, "params", params, 14,
              "policy_id, seed, prompt_len, start, threshold, factor, entropy_bound, credit_alpha, credit_beta, "
              "credit_gamma, alg_temp, temperature, counts and times");
  const char* const names[] = {"params.policy_id",     "params.seed",         "params.prompt_len",
                               "params.start",         "params.threshold",    "params.factor",
                               "params.entropy_bound", "params.credit_alpha", "params.credit_beta",
                               "params.credit_gamma",  "params.alg_temp",     "params.temperature"};
  for (size_t i = 0; i < 12; ++i) {
    check_input(names[i], params[i], i < 4 ? ScalarType::Long : ScalarType::Double, {canvas.size(0)}, canvas);
  }
  const Sizes table = {canvas.size(2), canvas.size(0)};
  check_input("params.counts", params[12], ScalarType::Long, table, canvas);
  check_input("params.times", params[13], ScalarType::Double, table, canvas);
}

void check_memory(const std::vector<Tensor>& memory, const Tensor& canvas, int64_t num_rows) {
  check(memory.empty() || memory.size() == 3, kOp, "memory must be 0 or 3 tensors, got ", memory.size(),
        "; give credit_ids, credits and the logits of these ids if a policy remembers something");
  if (memory.empty()) {
    return;
  }
  const Sizes positions = {canvas.size(0), canvas.size(2), kMaxCredited};
  check_input("memory.credit_ids", memory[0], ScalarType::Long, positions, canvas);
  check_input("memory.credits", memory[1], ScalarType::Double, positions, canvas);
  check_input("memory.given_logits", memory[2], ScalarType::Float, {num_rows, kMaxCredited}, canvas);
}

// Of a memory there are as many results as it has tensors of a state.
std::vector<Tensor> new_results(const Tensor& canvas, int64_t num_candidates, bool has_memory) {
  const int64_t num_reqs = canvas.size(0);
  const Sizes requests = {num_reqs};
  const Sizes positions = {num_reqs, canvas.size(2)};
  const Sizes candidates = {num_reqs, canvas.size(2), num_candidates};
  std::vector<Tensor> results = {
      torch::stable::new_empty(canvas, positions, ScalarType::Long),
      torch::stable::new_empty(canvas, positions, ScalarType::Long),
      torch::stable::new_empty(canvas, {num_reqs, canvas.size(1)}, ScalarType::Long),
      torch::stable::new_empty(canvas, positions, ScalarType::Long),
      torch::stable::new_empty(canvas, requests, ScalarType::Long),
      torch::stable::new_empty(canvas, requests, ScalarType::Long),
      torch::stable::new_empty(canvas, requests, ScalarType::Long),
      torch::stable::new_empty(canvas, requests, ScalarType::Bool),
      torch::stable::new_empty(canvas, requests, ScalarType::Bool),
      torch::stable::new_empty(canvas, candidates, ScalarType::Long),
      torch::stable::new_empty(canvas, candidates, ScalarType::Double),
  };
  if (has_memory) {
    const Sizes credited = {num_reqs, canvas.size(2), kMaxCredited};
    results.push_back(torch::stable::new_empty(canvas, credited, ScalarType::Long));
    results.push_back(torch::stable::new_empty(canvas, credited, ScalarType::Double));
  }
  return results;
}

}  // namespace

std::vector<Tensor> decide_walk(Tensor canvas, Tensor is_valid, std::optional<Tensor> end,
                                std::optional<Tensor> evaluated, std::vector<Tensor> rows, std::vector<Tensor> params,
                                std::vector<Tensor> memory, int64_t mask_token_id, bool unmasks_first_alone,
                                int64_t sub_block_length) {
  check(canvas.dim() == 3 && canvas.size(1) > 0, kOp,
        "canvas must be [num_reqs, num_nodes, block_length] with the root, got ", shape(canvas),
        "; put node 0, the request's true canvas, first");
  check_tensor(kOp, "canvas", canvas, ScalarType::Long, canvas);
  check_input("is_valid", is_valid, ScalarType::Bool, {canvas.size(0), canvas.size(1)}, canvas);
  if (end) {
    check_input("end", *end, ScalarType::Long, {canvas.size(0), canvas.size(2)}, canvas);
  }
  if (evaluated) {
    check_input("evaluated", *evaluated, ScalarType::Long, {canvas.size(0), canvas.size(1)}, canvas);
  }
  check(sub_block_length >= 0, kOp, "sub_block_length must be 0 or more, got ", sub_block_length, "; 0 is none");
  const int64_t num_rows = count_rows(canvas, evaluated, rows);
  check_rows(rows, canvas, num_rows);
  check_params(params, canvas);
  check_memory(memory, canvas, num_rows);
  const int64_t num_candidates = rows[2].size(1);
  std::vector<Tensor> out = new_results(canvas, num_candidates, !memory.empty());
  const bool is_sampled = rows.size() == 8;
  const DecideWalkArgs args = {
      .canvas = canvas.const_data_ptr<int64_t>(),
      .is_valid = is_valid.const_data_ptr<bool>(),
      .end = end ? end->const_data_ptr<int64_t>() : nullptr,
      .evaluated = evaluated ? evaluated->const_data_ptr<int64_t>() : nullptr,
      .token_ids = rows[0].const_data_ptr<int64_t>(),
      .token_logits = rows[1].const_data_ptr<float>(),
      .top_ids = rows[2].const_data_ptr<int64_t>(),
      .top_logits = rows[3].const_data_ptr<float>(),
      .rest = rows[4].const_data_ptr<double>(),
      .weighted = rows[5].const_data_ptr<double>(),
      .sampled_rest = is_sampled ? rows[6].const_data_ptr<double>() : nullptr,
      .sampled_weighted = is_sampled ? rows[7].const_data_ptr<double>() : nullptr,
      .policy = params[0].const_data_ptr<int64_t>(),
      .seed = params[1].const_data_ptr<int64_t>(),
      .prompt_len = params[2].const_data_ptr<int64_t>(),
      .start = params[3].const_data_ptr<int64_t>(),
      .threshold = params[4].const_data_ptr<double>(),
      .factor = params[5].const_data_ptr<double>(),
      .entropy_bound = params[6].const_data_ptr<double>(),
      .credit_alpha = params[7].const_data_ptr<double>(),
      .credit_beta = params[8].const_data_ptr<double>(),
      .credit_gamma = params[9].const_data_ptr<double>(),
      .alg_temp = params[10].const_data_ptr<double>(),
      .temperature = params[11].const_data_ptr<double>(),
      .counts = params[12].const_data_ptr<int64_t>(),
      .times = params[13].const_data_ptr<double>(),
      .credit_ids = memory.empty() ? nullptr : memory[0].const_data_ptr<int64_t>(),
      .credits = memory.empty() ? nullptr : memory[1].const_data_ptr<double>(),
      .credited_logits = memory.empty() ? nullptr : memory[2].const_data_ptr<float>(),
      .out_canvas = out[0].mutable_data_ptr<int64_t>(),
      .out_next_canvas = out[1].mutable_data_ptr<int64_t>(),
      .out_path = out[2].mutable_data_ptr<int64_t>(),
      .out_step = out[3].mutable_data_ptr<int64_t>(),
      .out_node = out[4].mutable_data_ptr<int64_t>(),
      .out_num_steps = out[5].mutable_data_ptr<int64_t>(),
      .out_num_unmasked = out[6].mutable_data_ptr<int64_t>(),
      .out_is_finished = out[7].mutable_data_ptr<bool>(),
      .out_came_over = out[8].mutable_data_ptr<bool>(),
      .out_ids = out[9].mutable_data_ptr<int64_t>(),
      .out_log_probs = out[10].mutable_data_ptr<double>(),
      .out_credit_ids = memory.empty() ? nullptr : out[11].mutable_data_ptr<int64_t>(),
      .out_credits = memory.empty() ? nullptr : out[12].mutable_data_ptr<double>(),
      .num_reqs = canvas.size(0),
      .num_nodes = canvas.size(1),
      .block_length = canvas.size(2),
      .num_candidates = num_candidates,
      .mask_token_id = mask_token_id,
      .unmasks_first_alone = unmasks_first_alone,
      .sub_block_length = sub_block_length,
  };
  DLLM_KERNEL(decide_walk).launch(canvas, args);
  return out;
}

}  // namespace dllm

DLLM_OP(decide_walk,
        "(Tensor canvas, Tensor is_valid, Tensor? end, Tensor? evaluated, Tensor[] rows, Tensor[] params, "
        "Tensor[] memory, int mask_token_id, bool unmasks_first_alone, int sub_block_length) -> Tensor[]")
