// The 16-bit floating-point types and their conversions, without CUDA's headers of them, which only nvcc knows.
#pragma once

#include <cstdint>

#include "launch.h"

namespace dllm::cuda {

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

__device__ inline float to_float(float value) { return value; }

__device__ inline float to_float(BFloat16 value) { return __uint_as_float(static_cast<uint32_t>(value.bits) << 16); }

__device__ inline float to_float(Half value) {
#ifdef __CUDACC__
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
#else
  return static_cast<float>(std::bit_cast<_Float16>(value.bits));
#endif
}

// Two numbers, rounded to nearest, as they lie in memory: `low` first.
template <typename Float>
__device__ inline uint32_t pack(float low, float high);

template <>
__device__ inline uint32_t pack<Half>(float low, float high) {
#ifdef __CUDACC__
  uint32_t result;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
#else
  const auto bits = [](float value) -> uint32_t { return std::bit_cast<uint16_t>(static_cast<_Float16>(value)); };
  return bits(low) | bits(high) << 16;
#endif
}

template <>
__device__ inline uint32_t pack<BFloat16>(float low, float high) {
#ifdef __CUDACC__
  uint32_t result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
#else
  const auto bits = [](float value) -> uint32_t {
    const uint32_t full = std::bit_cast<uint32_t>(value);
    return value != value ? 0x7fff : (full + 0x7fff + (full >> 16 & 1)) >> 16;
  };
  return bits(low) | bits(high) << 16;
#endif
}

template <typename Float>
__device__ inline Float from_float(float value) {
  if constexpr (std::is_same_v<Float, float>) {
    return value;
  } else {
    return {static_cast<uint16_t>(pack<Float>(value, 0.0f))};
  }
}

}  // namespace dllm::cuda
