// The kernels' argument structs and launch signatures. Pointers are unchecked: bindings/ checks them.
//
// Convention: sizes are counts, strides are in elements, a CUDA launcher returns nullptr or the reason of the failure.
#pragma once

#include <cstdint>

struct CUstream_st;  // cudaStream_t is a pointer to it; naming it keeps CUDA headers out of host code

namespace dllm {

using Stream = CUstream_st*;

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
