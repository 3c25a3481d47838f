#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace dllm::cpu {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512_bf16"};

Isa best_isa() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("x86-64-v4")) {
    return __builtin_cpu_supports("avx512bf16") ? Isa::kAvx512Bf16 : Isa::kAvx512;
  }
  if (__builtin_cpu_supports("x86-64-v3")) {
    return Isa::kAvx2;
  }
#endif
  return Isa::kPortable;
}

Isa choose_isa() {
  const Isa best = best_isa();
  const char* wanted = std::getenv("VLLM_DLLM_ISA");
  if (wanted == nullptr) {
    return best;
  }
  std::string allowed;
  for (int level = 0; level <= static_cast<int>(best); ++level) {
    if (std::strcmp(wanted, kNames[level]) == 0) {
      return static_cast<Isa>(level);
    }
    allowed += std::string(level == 0 ? "" : ", ") + kNames[level];
  }
  throw std::runtime_error(std::string("VLLM_DLLM_ISA is '") + wanted + "', this machine allows " + allowed +
                           "; choose one of these or unset it");
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose_isa();
  return chosen;
}

const char* isa_name() { return kNames[static_cast<int>(isa())]; }

}  // namespace dllm::cpu
