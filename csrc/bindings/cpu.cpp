#include <torch/csrc/stable/library.h>

#include "counter_uniform.h"

namespace dllm {
namespace {

Tensor counter_uniform(Tensor keys, int64_t first_id, int64_t num_ids) {
  check_counter_uniform(keys, first_id, num_ids);
  Tensor out = empty_counter_uniform(keys, num_ids);
  cpu::counter_uniform(counter_uniform_args(keys, out, first_id));
  return out;
}

}  // namespace
}  // namespace dllm

STABLE_TORCH_LIBRARY_IMPL(vllm_dllm, CPU, m) { m.impl("counter_uniform", TORCH_BOX(&dllm::counter_uniform)); }
