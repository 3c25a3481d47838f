#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace dllm::cpu {
namespace {

bool is_built(Isa isa) {
  switch (isa) {
    case Isa::kPortable:
#if defined(DLLM_BUILT_avx2)
    case Isa::kAvx2:
#endif
#if defined(DLLM_BUILT_avx512)
    case Isa::kAvx512:
#endif
#if defined(DLLM_BUILT_avx512_bf16)
    case Isa::kAvx512Bf16:
#endif
      return true;
    default:
      return false;
  }
}

// The names of those in the build that are not beyond `last`.
std::string built_up_to(Isa last, const char* separator) {
  std::string names;
  for (int level = 0; level <= static_cast<int>(last); ++level) {
    if (is_built(static_cast<Isa>(level))) {
      names += std::string(names.empty() ? "" : separator) + kIsaNames[level];
    }
  }
  return names;
}

Isa choose_isa() {
  const char* wanted = std::getenv("VLLM_DLLM_ISA");
  for (int level = static_cast<int>(machine_isa()); level >= 0; --level) {
    const Isa isa = static_cast<Isa>(level);
    if (is_built(isa) && (wanted == nullptr || std::strcmp(wanted, kIsaNames[level]) == 0)) {
      return isa;
    }
  }
  throw std::runtime_error(std::string("VLLM_DLLM_ISA is '") + wanted + "', this machine allows " +
                           built_up_to(machine_isa(), ", ") + " of those that the library was built for (" +
                           built_isas() + "); choose one of these or unset it");
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose_isa();
  return chosen;
}

std::string built_isas() { return built_up_to(Isa::kAvx512Bf16, ","); }

}  // namespace dllm::cpu
