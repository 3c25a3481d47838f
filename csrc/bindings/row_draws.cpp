#include "dllm/row_draws.h"

#include <optional>
#include <vector>

#include "library.h"

namespace dllm {
namespace {

constexpr const char* kOp = "row_draws";

void check_input(const char* name, const Tensor& tensor, ScalarType type, const Sizes& sizes, const Tensor& first) {
  check_shape(kOp, name, tensor, sizes, "sizes follow from is_masked, place and params.seed");
  check_tensor(kOp, name, tensor, type, first);
}

void check_below(const char* name, const Tensor& numbers, int64_t bound) {
  for (int64_t i = 0; i < numbers.size(0); ++i) {
    const int64_t number = numbers.const_data_ptr<int64_t>()[i];
    check(0 <= number && number < bound, kOp, name, "[", i, "] is ", number, ", allowed are 0..", bound - 1,
          "; give those of the step");
  }
}

}  // namespace

std::vector<Tensor> row_draws(std::vector<Tensor> requests, Tensor is_masked, std::optional<Tensor> place,
                              std::vector<Tensor> params, bool looks_ahead) {
  check_count(kOp, "requests", requests, 2, "slots and start");
  check_count(kOp, "params", params, 4, "seed, top_k, temperature and top_p");
  check(is_masked.dim() == 3, kOp, "is_masked must be [num_reqs, num_canvases, block_length], got ", shape(is_masked),
        "; give the root first");
  check(!place || place->dim() == 1, kOp, "place must be [num_evaluated]; reshape it");
  check(params[0].dim() == 1, kOp, "params.seed must be [num_slots], got ", shape(params[0]),
        "; give one of each slot");
  const int64_t num_canvases = is_masked.size(0) * is_masked.size(1);
  const Sizes slots = {params[0].size(0)};
  check_tensor(kOp, "is_masked", is_masked, ScalarType::Bool, is_masked);
  check_input("requests.slots", requests[0], ScalarType::Long, {is_masked.size(0)}, is_masked);
  check_input("requests.start", requests[1], ScalarType::Long, {is_masked.size(0)}, is_masked);
  check_input("params.seed", params[0], ScalarType::Long, slots, is_masked);
  check_input("params.top_k", params[1], ScalarType::Long, slots, is_masked);
  check_input("params.temperature", params[2], ScalarType::Double, slots, is_masked);
  check_input("params.top_p", params[3], ScalarType::Double, slots, is_masked);
  if (place) {
    check_input("place", *place, ScalarType::Long, {place->size(0)}, is_masked);
  }
  const int64_t num_rows = (place ? place->size(0) : num_canvases) * is_masked.size(2);
  std::vector<Tensor> out = {torch::stable::new_empty(is_masked, {num_rows}, ScalarType::Double),
                             torch::stable::new_empty(is_masked, {num_rows}, ScalarType::Long),
                             torch::stable::new_empty(is_masked, {num_rows}, ScalarType::Double),
                             torch::stable::new_empty(is_masked, {num_rows}, ScalarType::Long)};
  const RowDrawsArgs args = {
      .slots = requests[0].const_data_ptr<int64_t>(),
      .start = requests[1].const_data_ptr<int64_t>(),
      .is_masked = is_masked.const_data_ptr<bool>(),
      .place = place ? place->const_data_ptr<int64_t>() : nullptr,
      .seed = params[0].const_data_ptr<int64_t>(),
      .top_k = params[1].const_data_ptr<int64_t>(),
      .temperature = params[2].const_data_ptr<double>(),
      .top_p = params[3].const_data_ptr<double>(),
      .out_temperature = out[0].mutable_data_ptr<double>(),
      .out_top_k = out[1].mutable_data_ptr<int64_t>(),
      .out_top_p = out[2].mutable_data_ptr<double>(),
      .out_keys = out[3].mutable_data_ptr<int64_t>(),
      .num_rows = num_rows,
      .num_canvases = is_masked.size(1),
      .block_length = is_masked.size(2),
      .looks_ahead = looks_ahead,
  };
  if (is_masked.is_cpu()) {
    check_below("requests.slots", requests[0], slots[0]);
    if (place) {
      check_below("place", *place, num_canvases);
    }
  }
  DLLM_KERNEL(row_draws).launch(is_masked, args);
  return out;
}

}  // namespace dllm

DLLM_OP(row_draws,
        "(Tensor[] requests, Tensor is_masked, Tensor? place, Tensor[] params, bool looks_ahead) -> Tensor[]")
