// Vectors of floats of the width that the file is compiled for, and the few functions that the kernels need of them.
//
// Files in this folder are compiled once per instruction set, each time into a namespace of its own (DLLM_ISA). All
// they define is in it or has internal linkage, so that no function compiled for a newer CPU is linked into an older
// path.
#pragma once

#include <cstdint>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace dllm::cpu::DLLM_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kTileRows = 8;  // rows of a register tile: 8 x 3 accumulators of 32 registers
#elif defined(__AVX__)
constexpr int kLanes = 8;
constexpr int kTileRows = 4;  // 4 x 3 of 16
#else
constexpr int kLanes = 4;
constexpr int kTileRows = 4;
#endif

typedef float VecF __attribute__((vector_size(4 * kLanes)));
typedef int32_t VecI __attribute__((vector_size(4 * kLanes)));

typedef float UnalignedVecF __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t UnalignedVecI __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

inline VecF load(const float* from) { return *reinterpret_cast<const UnalignedVecF*>(from); }
inline void store(float* to, VecF vec) { *reinterpret_cast<UnalignedVecF*>(to) = vec; }
inline VecF splat(float value) { return value - VecF{}; }
inline VecI splat(int32_t value) { return value - VecI{}; }
inline VecF max(VecF a, VecF b) { return a > b ? a : b; }

// Which of the lanes [first, first + kLanes) lie in [begin, end).
inline VecI are_between(int32_t first, int32_t begin, int32_t end) {
  VecI lane;
  for (int i = 0; i < kLanes; ++i) {
    lane[i] = first + i;
  }
  return (lane >= splat(begin)) & (lane < splat(end));
}

// 2^x with a relative error of 2e-7; 0 below 2^-126.
inline VecF exp2(VecF x) {
  const VecF clamped = max(splat(-127.0f), x);  // a NaN stays one
  const VecF magic = splat(12582912.0f);        // 1.5 * 2^23: adding it rounds, and leaves the integer in the low bits
  const VecF shifted = clamped + magic;
  const VecF f = clamped - (shifted - magic);
  VecF p = splat(1.535336188319500e-4f);
  p = p * f + splat(1.339887440266574e-3f);
  p = p * f + splat(9.618437357674640e-3f);
  p = p * f + splat(5.550332471162809e-2f);
  p = p * f + splat(2.402264791363012e-1f);
  p = p * f + splat(6.931472028550421e-1f);
  p = p * f + splat(1.0f);
  const VecI power = (reinterpret_cast<VecI>(shifted) + 127) << 23;  // 0.0 for the lowest
  return p * reinterpret_cast<VecF>(power);
}

}  // namespace dllm::cpu::DLLM_ISA
