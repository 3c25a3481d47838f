// The instruction set that the CPU kernels run with: the best one that the build and the machine have, chosen once.
//
// Sources in simd/ are compiled for each of CMake's DLLM_ISAS, and for portable always; DLLM_DISPATCH calls those of
// the chosen one.
#pragma once

#include <string>

namespace dllm::cpu {

enum class Isa { kPortable, kAvx2, kAvx512, kAvx512Bf16 };

// As VLLM_DLLM_ISA and DLLM_ISAS spell them.
inline constexpr const char* kIsaNames[] = {"portable", "avx2", "avx512", "avx512_bf16"};

// The best one that the machine has, in the build or not.
inline Isa machine_isa() {
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

// Raises std::runtime_error if VLLM_DLLM_ISA names one that is unknown, or that the build or the machine lacks.
Isa isa();

// Those of the build, with commas: "portable,avx2".
std::string built_isas();

inline const char* name_of(Isa isa) { return kIsaNames[static_cast<int>(isa)]; }

}  // namespace dllm::cpu

// Declare `void function(const Args&)` of each instruction set.
#define DLLM_DECLARE(function, Args) \
  namespace dllm::cpu::portable {    \
  void function(const Args&);        \
  }                                  \
  namespace dllm::cpu::avx2 {        \
  void function(const Args&);        \
  }                                  \
  namespace dllm::cpu::avx512 {      \
  void function(const Args&);        \
  }                                  \
  namespace dllm::cpu::avx512_bf16 { \
  void function(const Args&);        \
  }

// A case for each instruction set of the build; CMake defines DLLM_BUILT_*.
#if defined(DLLM_BUILT_avx2)
#define DLLM_CASE_AVX2(call)    \
  case ::dllm::cpu::Isa::kAvx2: \
    return avx2::call;
#else
#define DLLM_CASE_AVX2(call)
#endif
#if defined(DLLM_BUILT_avx512)
#define DLLM_CASE_AVX512(call)    \
  case ::dllm::cpu::Isa::kAvx512: \
    return avx512::call;
#else
#define DLLM_CASE_AVX512(call)
#endif
#if defined(DLLM_BUILT_avx512_bf16)
#define DLLM_CASE_AVX512_BF16(call)   \
  case ::dllm::cpu::Isa::kAvx512Bf16: \
    return avx512_bf16::call;
#else
#define DLLM_CASE_AVX512_BF16(call)
#endif

#define DLLM_DISPATCH(function, args)     \
  switch (::dllm::cpu::isa()) {           \
    DLLM_CASE_AVX512_BF16(function(args)) \
    DLLM_CASE_AVX512(function(args))      \
    DLLM_CASE_AVX2(function(args))        \
    default:                              \
      return portable::function(args);    \
  }
