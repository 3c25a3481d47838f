#include <string>

#include "../cpu/isa.h"
#include "library.h"

namespace dllm {

// The library's only op without a tensor: which instruction set the CPU kernels run with, for `vllm-dllm doctor`.
std::string cpu_isa() { return cpu::isa_name(); }

}  // namespace dllm

STABLE_TORCH_LIBRARY_FRAGMENT(DLLM_LIBRARY, m) { m.def("cpu_isa() -> str"); }
STABLE_TORCH_LIBRARY_IMPL(DLLM_LIBRARY, CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&dllm::cpu_isa)); }
