// Types that the argument structs of all kernels share.
//
// Convention: sizes are counts, strides are in elements, intervals are [begin, end). A kernel takes one argument
// struct; its pointers are unchecked, since bindings/ checks them. A CUDA launcher returns nullptr or the reason of the
// failure.
#pragma once

#include <cstdint>

struct CUstream_st;  // cudaStream_t is a pointer to it; naming it keeps CUDA headers out of host code

namespace dllm {

using Stream = CUstream_st*;

constexpr int32_t kMaxCandidates = 8;  // tokens of a position that a draft may choose from

enum class FloatType { kFloat32, kFloat16, kBFloat16 };

}  // namespace dllm
