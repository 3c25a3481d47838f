// Launch geometry and the check after each launch.
#pragma once

#include <algorithm>
#include <cstdint>

namespace dllm::cuda {

constexpr int kThreads = 256;
constexpr int64_t kMaxCtas = 1 << 16;

// CTAs for a grid-stride loop over `num_items`.
inline unsigned num_ctas(int64_t num_items) {
  return static_cast<unsigned>(std::min((num_items + kThreads - 1) / kThreads, kMaxCtas));
}

// The reason why the launch just made failed, or nullptr.
inline const char* launch_error() {
  const cudaError_t status = cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace dllm::cuda
