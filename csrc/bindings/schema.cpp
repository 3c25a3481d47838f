// The schema of every op, once; fakes are in vllm_dllm/ops/fake.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(vllm_dllm, m) { m.def("counter_uniform(Tensor keys, int first_id, int num_ids) -> Tensor"); }
