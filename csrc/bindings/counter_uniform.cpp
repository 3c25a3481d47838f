#include "dllm/counter_uniform.h"

#include "library.h"

namespace dllm {

Tensor counter_uniform(Tensor keys, int64_t first_id, int64_t num_ids) {
  check(keys.dim() == 1, "counter_uniform: keys must be [num_rows], got ", shape(keys),
        "; flatten them and reshape the result");
  check(keys.scalar_type() == ScalarType::Long, "counter_uniform: keys must be int64, got ", keys.scalar_type(),
        "; make them with vllm_dllm.noise.stream_keys");
  check(first_id >= -1, "counter_uniform: first_id is ", first_id,
        "; give a vocabulary id or -1 (the stream's own number)");
  check(num_ids >= 0, "counter_uniform: num_ids is ", num_ids, "; give 0 or more");
  Tensor out = torch::stable::new_empty(keys, {keys.size(0), num_ids}, ScalarType::Double);
  const CounterUniformArgs args = {
      .keys = keys.const_data_ptr<int64_t>(),
      .key_stride = keys.stride(0),
      .out = out.mutable_data_ptr<double>(),
      .num_rows = out.size(0),
      .num_ids = out.size(1),
      .first_id = first_id,
  };
  DLLM_KERNEL(counter_uniform).launch(keys, args);
  return out;
}

}  // namespace dllm

DLLM_OP(counter_uniform, "(Tensor keys, int first_id, int num_ids) -> Tensor")
