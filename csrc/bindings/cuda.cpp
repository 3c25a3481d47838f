#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "counter_uniform.h"

namespace dllm {
namespace {

using torch::stable::accelerator::DeviceGuard;

Stream current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<Stream>(stream);
}

void check_launch(const char* op, const char* error) {
  check(error == nullptr, op, ": the CUDA launch failed: ", error == nullptr ? "" : error,
        "; an earlier kernel may be the cause, run again with CUDA_LAUNCH_BLOCKING=1");
}

Tensor counter_uniform(Tensor keys, int64_t first_id, int64_t num_ids) {
  check_counter_uniform(keys, first_id, num_ids);
  const DeviceGuard guard(keys.get_device_index());
  Tensor out = empty_counter_uniform(keys, num_ids);
  check_launch("counter_uniform",
               cuda::counter_uniform(counter_uniform_args(keys, out, first_id), current_stream(keys)));
  return out;
}

}  // namespace
}  // namespace dllm

STABLE_TORCH_LIBRARY_IMPL(vllm_dllm, CUDA, m) { m.impl("counter_uniform", TORCH_BOX(&dllm::counter_uniform)); }
