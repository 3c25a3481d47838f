// Eight numbers at a time between memory of a float type and float32; rounding is to nearest, ties to even.
//
// Bit arithmetic instead of conversion instructions: one text for every instruction set, bound by memory in each.
#pragma once

#include "vec.h"

namespace dllm::cpu::DLLM_ISA {

constexpr int kRun = 8;  // divides every head_dim

typedef float RunF __attribute__((vector_size(4 * kRun)));
typedef uint32_t RunU __attribute__((vector_size(4 * kRun)));
typedef uint16_t RunU16 __attribute__((vector_size(2 * kRun)));

typedef float UnalignedRunF __attribute__((vector_size(4 * kRun), aligned(4), may_alias));
typedef uint32_t UnalignedRunU __attribute__((vector_size(4 * kRun), aligned(4), may_alias));
typedef uint16_t UnalignedRunU16 __attribute__((vector_size(2 * kRun), aligned(2), may_alias));

inline RunU load_u16(const uint16_t* from) {
  return __builtin_convertvector(*reinterpret_cast<const UnalignedRunU16*>(from), RunU);
}
inline void store_u16(uint16_t* to, RunU bits) {
  *reinterpret_cast<UnalignedRunU16*>(to) = __builtin_convertvector(bits, RunU16);
}

struct Float32 {
  using Stored = float;
  static RunF load(const float* from) { return *reinterpret_cast<const UnalignedRunF*>(from); }
  static void store(float* to, RunF run) { *reinterpret_cast<UnalignedRunF*>(to) = run; }
};

struct BFloat16 {
  using Stored = uint16_t;
  static RunF load(const uint16_t* from) { return reinterpret_cast<RunF>(load_u16(from) << 16); }
  static void store(uint16_t* to, RunF run) {
    const RunU bits = reinterpret_cast<RunU>(run);
    const RunU rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    const RunU quiet_nan = (bits >> 16) | 0x40;  // rounding could carry a NaN into the sign
    store_u16(to, run == run ? rounded : quiet_nan);
  }
};

struct Float16 {
  using Stored = uint16_t;

  static RunF load(const uint16_t* from) {
    const RunU half = load_u16(from);
    // The exponent's bias differs by 112; the product also normalises what is subnormal in float16.
    const RunU magnitude = (half & 0x7FFF) << 13;
    const RunU scaled = reinterpret_cast<RunU>(reinterpret_cast<RunF>(magnitude) * 0x1p112f);
    const RunU is_special = reinterpret_cast<RunU>(magnitude >= (0x7C00u << 13));  // infinity or NaN
    return reinterpret_cast<RunF>(scaled | (is_special & 0x7F800000u) | ((half & 0x8000) << 16));
  }

  static void store(uint16_t* to, RunF run) {
    const RunU bits = reinterpret_cast<RunU>(run);
    const RunU sign = bits & 0x80000000u;
    const RunU magnitude = bits ^ sign;
    const RunU normal = (magnitude - (112u << 23) + 0xFFF + ((magnitude >> 13) & 1)) >> 13;
    // Below 2^-14 the sum with 0.5 rounds at float16's last bit, and ends in its bits.
    const RunU subnormal = reinterpret_cast<RunU>(reinterpret_cast<RunF>(magnitude) + 0.5f) - 0x3F000000u;
    RunU half = magnitude < (113u << 23) ? subnormal : normal;
    half = magnitude >= 0x477FF000u ? half * 0 + 0x7C00u : half;  // from 65520 on: infinity
    half = magnitude > 0x7F800000u ? half * 0 + 0x7E00u : half;
    store_u16(to, half | (sign >> 16));
  }
};

}  // namespace dllm::cpu::DLLM_ISA
