// The instruction set that the CPU kernels run with: the best one that the machine has, chosen once.
//
// Sources in simd/ are compiled once for each; DLLM_DISPATCH calls the one for the machine at hand.
#pragma once

namespace dllm::cpu {

enum class Isa { kPortable, kAvx2, kAvx512, kAvx512Bf16 };

// Raises std::runtime_error if VLLM_DLLM_ISA names one that is unknown or that the machine lacks.
Isa isa();

// "portable", "avx2", "avx512" or "avx512_bf16", as VLLM_DLLM_ISA spells them.
const char* isa_name();

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

#if defined(__x86_64__)
#define DLLM_DISPATCH(function, args)     \
  switch (::dllm::cpu::isa()) {           \
    case ::dllm::cpu::Isa::kAvx512Bf16:   \
      return avx512_bf16::function(args); \
    case ::dllm::cpu::Isa::kAvx512:       \
      return avx512::function(args);      \
    case ::dllm::cpu::Isa::kAvx2:         \
      return avx2::function(args);        \
    case ::dllm::cpu::Isa::kPortable:     \
      return portable::function(args);    \
  }
#else
#define DLLM_DISPATCH(function, args) return portable::function(args)
#endif
