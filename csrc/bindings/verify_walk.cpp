#include "dllm/verify_walk.h"

#include <tuple>

#include "library.h"

namespace dllm {
namespace {

constexpr const char* kOp = "verify_walk";

}  // namespace

std::tuple<Tensor, Tensor> verify_walk(Tensor canvas, Tensor next_canvas, Tensor is_valid) {
  check(canvas.dim() == 3 && canvas.size(1) > 0, kOp,
        "canvas must be [num_reqs, num_nodes, block_length] with the root, got ", shape(canvas),
        "; put node 0, the request's true canvas, first");
  const int64_t num_reqs = canvas.size(0);
  const int64_t num_nodes = canvas.size(1);
  const int64_t block_length = canvas.size(2);
  check_shape(kOp, "next_canvas", next_canvas, {num_reqs, num_nodes, block_length},
              "give the next canvas of every node");
  check_shape(kOp, "is_valid", is_valid, {num_reqs, num_nodes}, "give one bool for every node");
  check_tensor(kOp, "canvas", canvas, ScalarType::Long, canvas);
  check_tensor(kOp, "next_canvas", next_canvas, ScalarType::Long, canvas);
  check_tensor(kOp, "is_valid", is_valid, ScalarType::Bool, canvas);
  Tensor node = torch::stable::new_empty(canvas, {num_reqs}, ScalarType::Long);
  Tensor num_accepted = torch::stable::new_empty(canvas, {num_reqs}, ScalarType::Long);
  const VerifyWalkArgs args = {
      .canvas = canvas.const_data_ptr<int64_t>(),
      .next_canvas = next_canvas.const_data_ptr<int64_t>(),
      .is_valid = is_valid.const_data_ptr<bool>(),
      .node = node.mutable_data_ptr<int64_t>(),
      .num_accepted = num_accepted.mutable_data_ptr<int64_t>(),
      .num_reqs = num_reqs,
      .num_nodes = num_nodes,
      .block_length = block_length,
  };
  DLLM_KERNEL(verify_walk).launch(canvas, args);
  return {node, num_accepted};
}

}  // namespace dllm

DLLM_OP(verify_walk, "(Tensor canvas, Tensor next_canvas, Tensor is_valid) -> (Tensor, Tensor)")
