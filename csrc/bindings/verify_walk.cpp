#include "dllm/verify_walk.h"

#include <tuple>

#include "library.h"

namespace dllm {

std::tuple<Tensor, Tensor> verify_walk(Tensor canvas, Tensor next_canvas, Tensor is_valid) {
  check(canvas.dim() == 3 && canvas.size(1) > 0,
        "verify_walk: canvas must be [num_reqs, num_nodes, block_length] with the root, got ", shape(canvas),
        "; put node 0, the request's true canvas, first");
  check(shape(next_canvas) == shape(canvas), "verify_walk: next_canvas must have the shape of canvas, ", shape(canvas),
        ", got ", shape(next_canvas), "; give the next canvas of every node");
  check(is_valid.dim() == 2 && is_valid.size(0) == canvas.size(0) && is_valid.size(1) == canvas.size(1),
        "verify_walk: is_valid must be [", canvas.size(0), ", ", canvas.size(1), "], got ", shape(is_valid),
        "; give one bool for every node");
  check_tensor("verify_walk", "canvas", canvas, ScalarType::Long, canvas);
  check_tensor("verify_walk", "next_canvas", next_canvas, ScalarType::Long, canvas);
  check_tensor("verify_walk", "is_valid", is_valid, ScalarType::Bool, canvas);
  Tensor node = torch::stable::new_empty(canvas, {canvas.size(0)}, ScalarType::Long);
  Tensor num_accepted = torch::stable::new_empty(canvas, {canvas.size(0)}, ScalarType::Long);
  const VerifyWalkArgs args = {
      .canvas = canvas.const_data_ptr<int64_t>(),
      .next_canvas = next_canvas.const_data_ptr<int64_t>(),
      .is_valid = is_valid.const_data_ptr<bool>(),
      .node = node.mutable_data_ptr<int64_t>(),
      .num_accepted = num_accepted.mutable_data_ptr<int64_t>(),
      .num_reqs = canvas.size(0),
      .num_nodes = canvas.size(1),
      .block_length = canvas.size(2),
  };
  DLLM_KERNEL(verify_walk).launch(canvas, args);
  return {node, num_accepted};
}

}  // namespace dllm

DLLM_OP(verify_walk, "(Tensor canvas, Tensor next_canvas, Tensor is_valid) -> (Tensor, Tensor)")
