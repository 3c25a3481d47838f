// counter_uniform: uniform numbers of consecutive ids in counter-based streams.
#pragma once

#include "dllm/types.h"

namespace dllm {

// out[row, i] = uniform(keys[row], first_id + i)
struct CounterUniformArgs {
  const int64_t* keys;  // [num_rows], stride key_stride
  int64_t key_stride;
  double* out;  // [num_rows, num_ids], contiguous
  int64_t num_rows;
  int64_t num_ids;
  int64_t first_id;
};

namespace cpu {
void counter_uniform(const CounterUniformArgs& args);
}

namespace cuda {
const char* counter_uniform(const CounterUniformArgs& args, Stream stream);
}

}  // namespace dllm
