#include "dllm/multiply_adds.h"

#include "panel.h"

namespace dllm::cpu::DLLM_ISA {
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

void multiply_adds(const MultiplyAddsArgs& args) {
  int64_t num_flops = 0;
#pragma omp parallel reduction(+ : num_flops)
  {
#if defined(__AVX512BF16__)
    if (args.is_bfloat16) {
      num_flops += multiply_add_rounds<BFloat16Pair, 4>(args.num_rounds);
    } else
#endif
    {
      num_flops += multiply_add_rounds<Float, 2>(args.num_rounds);
    }
  }
  *args.num_flops = num_flops;
}

}  // namespace dllm::cpu::DLLM_ISA
