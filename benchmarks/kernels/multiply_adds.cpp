// The arithmetic that the machine can do, with nothing to read or to write. floor.py compiles it for the instruction
// set of the CPU kernels, whose products it takes.
#include "cpu/simd/panel.h"

using namespace dllm::cpu::DLLM_ISA;

namespace {

constexpr int kSums = 12;  // independent sums: two units with a latency of four to five, within 16 registers

// Returns the operations of one thread.
template <typename Number, int kFlopsPerLane>
int64_t multiply_add_rounds(int64_t num_rounds) {
  typename Number::Element factors[kLanes] = {};
  VecF sums[kSums] = {};
  // To the compiler this reads and writes both: it can neither know the values nor drop the work.
  asm volatile("" : : "r"(factors), "r"(sums) : "memory");
  for (int64_t round = 0; round < num_rounds; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < kSums; ++i) {
      sums[i] = Number::multiply_add(factors[0], factors, sums[i]);
    }
  }
  asm volatile("" : : "r"(sums) : "memory");
  return num_rounds * kSums * kLanes * kFlopsPerLane;
}

}  // namespace

// Multiply and add in registers, on all threads: pairs of bfloat16 where that is asked for and the instruction set has
// them. Returns how many floating-point operations that took; a multiplication and an addition count as two.
extern "C" int64_t multiply_adds(int64_t num_rounds, [[maybe_unused]] bool is_bfloat16) {
  int64_t num_flops = 0;
#pragma omp parallel reduction(+ : num_flops)
  {
#if defined(__AVX512BF16__)
    if (is_bfloat16) {
      num_flops += multiply_add_rounds<BFloat16Pair, 4>(num_rounds);
    } else
#endif
    {
      num_flops += multiply_add_rounds<Float, 2>(num_rounds);
    }
  }
  return num_flops;
}
