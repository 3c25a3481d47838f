// multiply_adds: the arithmetic that the machine can do, with nothing to read or to write.
#pragma once

#include <cstdint>

namespace dllm {

struct MultiplyAddsArgs {
  int64_t num_rounds;
  bool is_bfloat16;    // pairs of bfloat16, where the instruction set has them
  int64_t* num_flops;  // written: a multiplication and an addition count as two
};

}  // namespace dllm
