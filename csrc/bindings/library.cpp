#include "library.h"

#include <string>

#include "../cpu/isa.h"

// Ops without a tensor: what the library says of itself, for `vllm-dllm doctor`.
namespace dllm {

// The instruction set that the CPU kernels run with.
std::string cpu_isa() { return cpu::name_of(cpu::isa()); }

// The best one that the machine has, in the build or not.
std::string machine_isa() { return cpu::name_of(cpu::machine_isa()); }

// What the CPU kernels are compiled for: "portable,avx2".
std::string built_isas() { return cpu::built_isas(); }

// What the CUDA kernels are compiled for, as CMAKE_CUDA_ARCHITECTURES has it with commas: "80,90a"; empty without CUDA.
std::string cuda_archs() { return DLLM_CUDA_ARCHS; }

}  // namespace dllm

STABLE_TORCH_LIBRARY_FRAGMENT(DLLM_LIBRARY, m) {
  m.def("cpu_isa() -> str");
  m.def("machine_isa() -> str");
  m.def("built_isas() -> str");
  m.def("cuda_archs() -> str");
}
STABLE_TORCH_LIBRARY_IMPL(DLLM_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&dllm::cpu_isa));
  m.impl("machine_isa", TORCH_BOX(&dllm::machine_isa));
  m.impl("built_isas", TORCH_BOX(&dllm::built_isas));
  m.impl("cuda_archs", TORCH_BOX(&dllm::cuda_archs));
}
