#include "dllm/step_rows.h"

#include <optional>
#include <vector>

#include "library.h"

namespace dllm {
namespace {

constexpr const char* kOp = "step_rows";

void check_input(const char* name, const Tensor& tensor, ScalarType type, const Sizes& sizes, const Tensor& canvas) {
  check_shape(kOp, name, tensor, sizes, "sizes follow from canvas and into.input_ids");
  check_tensor(kOp, name, tensor, type, canvas);
}

// A table of int32 whose rows may lie apart, with at least `num_rows` of them.
void check_table(const char* name, const Tensor& table, int64_t num_rows, const Tensor& canvas) {
  check(table.dim() == 2 && table.size(0) >= num_rows, kOp, name, " must be [", num_rows, " or more, n], got ",
        shape(table), "; give a row for each");
  check_type(kOp, name, table, ScalarType::Int);
  check_last_contiguous(kOp, name, table);
  check_device(kOp, name, table, canvas);
}

// Check the numbers of a plan, which tell the kernel where to read.
void check_plan(const StepRowsArgs& args, int64_t num_slots, int64_t max_len, int64_t max_pages) {
  const int64_t num_ends = args.end == nullptr ? 0 : args.num_reqs * args.block_length;
  const int64_t num_sources = args.num_canvases * args.block_length + num_ends + 1;
  for (int64_t row = 0; row < args.num_rows; ++row) {
    const int64_t request = args.request[row];
    const int64_t position = args.position[row];
    check(0 <= request && request < args.num_reqs && 0 <= position && args.source[row] < num_sources, kOp,
          "plan of row ", row, " is request ", request, ", source ", args.source[row], ", position ", position,
          ", allowed are 0..", args.num_reqs - 1, ", up to ", num_sources - 1,
          " and 0 or more; give those of the step");
    check(args.source[row] >= 0 || position < max_len, kOp, "plan of row ", row, " takes the token at ", position,
          ", known has ", max_len, " positions; give those of the step");
    const bool is_stored = args.pages != nullptr && args.is_stored[row] != 0;
    check(!is_stored || position / args.page_size < max_pages, kOp, "plan of row ", row, " stores position ", position,
          " in pages of ", args.page_size, ", the table has ", max_pages, "; give those of the step");
  }
  for (int64_t i = 0; i < args.num_reqs; ++i) {
    check(0 <= args.slots[i] && args.slots[i] < num_slots, kOp, "requests.slots[", i, "] is ", args.slots[i],
          ", allowed are 0..", num_slots - 1, "; give the slots of the requests");
  }
}

}  // namespace

std::vector<Tensor> step_rows(Tensor canvas, std::optional<Tensor> end, std::vector<Tensor> requests,
                              std::vector<Tensor> plan, Tensor known, std::optional<Tensor> pages, int64_t page_size,
                              std::vector<Tensor> into, int64_t mask_token_id, int64_t null_page) {
  check(canvas.dim() == 3, kOp, "canvas must be [num_reqs, num_canvases, block_length], got ", shape(canvas),
        "; give the root first");
  check_tensor(kOp, "canvas", canvas, ScalarType::Long, canvas);
  check_count(kOp, "requests", requests, 2, "slots and start");
  check_count(kOp, "into", into, 2, "input_ids and positions");
  const int64_t num_reqs = canvas.size(0);
  const int64_t num_tokens = num_reqs * canvas.size(1) * canvas.size(2);
  check(into[0].dim() == 1, kOp, "into.input_ids must be [num_rows], got ", shape(into[0]), "; reshape it");
  const int64_t num_rows = into[0].size(0);
  check(plan.empty() || plan.size() == 4, kOp, "plan must be 0 or 4 tensors, got ", plan.size(),
        "; give request, source, position and is_stored of each row unless the rows are those of the canvases");
  check(!plan.empty() || num_rows == num_tokens, kOp, "into.input_ids must have ", num_tokens,
        " rows without a plan, got ", num_rows, "; give one for each token of the canvases");
  check_input("into.input_ids", into[0], ScalarType::Int, {num_rows}, canvas);
  check_input("into.positions", into[1], ScalarType::Long, {num_rows}, canvas);
  check_input("requests.slots", requests[0], ScalarType::Long, {num_reqs}, canvas);
  check_input("requests.start", requests[1], ScalarType::Long, {num_reqs}, canvas);
  if (end) {
    check_input("end", *end, ScalarType::Long, {num_reqs, canvas.size(2)}, canvas);
  }
  const char* const names[] = {"plan.request", "plan.source", "plan.position", "plan.is_stored"};
  for (size_t i = 0; i < plan.size(); ++i) {
    check_input(names[i], plan[i], ScalarType::Long, {num_rows}, canvas);
  }
  check_table("known", known, 1, canvas);
  const bool stores = pages.has_value() && !plan.empty();
  if (stores) {
    check_table("pages", *pages, num_reqs, canvas);
    check(page_size > 0, kOp, "page_size must be above 0, got ", page_size, "; give positions per page");
  }
  const Sizes rows = {stores ? num_rows : 0};
  std::vector<Tensor> out = {torch::stable::new_empty(canvas, rows, ScalarType::Long),
                             torch::stable::new_empty(canvas, rows, ScalarType::Long)};
  const auto planned = [&](size_t i) { return plan.empty() ? nullptr : plan[i].const_data_ptr<int64_t>(); };
  const StepRowsArgs args = {
      .canvas = canvas.const_data_ptr<int64_t>(),
      .end = end ? end->const_data_ptr<int64_t>() : nullptr,
      .slots = requests[0].const_data_ptr<int64_t>(),
      .start = requests[1].const_data_ptr<int64_t>(),
      .request = planned(0),
      .source = planned(1),
      .position = planned(2),
      .is_stored = planned(3),
      .known = known.const_data_ptr<int32_t>(),
      .known_stride = known.stride(0),
      .pages = stores ? pages->const_data_ptr<int32_t>() : nullptr,
      .pages_stride = stores ? pages->stride(0) : 0,
      .page_size = page_size,
      .out_ids = into[0].mutable_data_ptr<int32_t>(),
      .out_positions = into[1].mutable_data_ptr<int64_t>(),
      .out_page = stores ? out[0].mutable_data_ptr<int64_t>() : nullptr,
      .out_offset = stores ? out[1].mutable_data_ptr<int64_t>() : nullptr,
      .num_rows = num_rows,
      .num_canvases = num_reqs * canvas.size(1),
      .per_request = canvas.size(1),
      .block_length = canvas.size(2),
      .num_reqs = num_reqs,
      .mask_token_id = mask_token_id,
      .null_page = null_page,
  };
  if (canvas.is_cpu() && !plan.empty()) {
    check_plan(args, known.size(0), known.size(1), stores ? pages->size(1) : 0);
  }
  DLLM_KERNEL(step_rows).launch(canvas, args);
  return out;
}

}  // namespace dllm

DLLM_OP(step_rows,
        "(Tensor canvas, Tensor? end, Tensor[] requests, Tensor[] plan, Tensor known, Tensor? pages, int page_size, "
        "Tensor(a!)[] into, int mask_token_id, int null_page) -> Tensor[]")
