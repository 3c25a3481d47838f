#include "library.h"

#include <string>

#include "../cpu/isa.h"
#include "dllm/multiply_adds.h"

DLLM_DECLARE(multiply_adds, MultiplyAddsArgs)

// Ops without a tensor: what the library says of itself, for `vllm-dllm doctor` and `vllm-dllm bench kernels`.
namespace dllm {
namespace cpu {

void multiply_adds(const MultiplyAddsArgs& args) { DLLM_DISPATCH(multiply_adds, args); }

}  // namespace cpu

// The instruction set that the CPU kernels run with.
std::string cpu_isa() { return cpu::name_of(cpu::isa()); }

// The best one that the machine has, in the build or not.
std::string machine_isa() { return cpu::name_of(cpu::machine_isa()); }

// What the CPU kernels are compiled for: "portable,avx2".
std::string built_isas() { return cpu::built_isas(); }

// What the CUDA kernels are compiled for, as CMAKE_CUDA_ARCHITECTURES has it with commas: "80,90a"; empty without CUDA.
std::string cuda_archs() { return DLLM_CUDA_ARCHS; }

// Multiply and add in registers, on all threads. Returns how many floating-point operations that took.
int64_t multiply_adds(int64_t num_rounds, bool is_bfloat16) {
  int64_t num_flops = 0;
  cpu::multiply_adds({.num_rounds = num_rounds, .is_bfloat16 = is_bfloat16, .num_flops = &num_flops});
  return num_flops;
}

}  // namespace dllm

STABLE_TORCH_LIBRARY_FRAGMENT(DLLM_LIBRARY, m) {
  m.def("cpu_isa() -> str");
  m.def("machine_isa() -> str");
  m.def("built_isas() -> str");
  m.def("cuda_archs() -> str");
  m.def("multiply_adds(int num_rounds, bool is_bfloat16) -> int");
}
STABLE_TORCH_LIBRARY_IMPL(DLLM_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&dllm::cpu_isa));
  m.impl("machine_isa", TORCH_BOX(&dllm::machine_isa));
  m.impl("built_isas", TORCH_BOX(&dllm::built_isas));
  m.impl("cuda_archs", TORCH_BOX(&dllm::cuda_archs));
  m.impl("multiply_adds", TORCH_BOX(&dllm::multiply_adds));
}
