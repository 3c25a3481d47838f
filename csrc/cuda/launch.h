// Launch of a kernel and what kernels need of their surroundings. Without nvcc the kernels run on the emulator
// (tests/simt/README.md).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "dllm/types.h"

#ifdef __CUDACC__
// A variable in shared memory. `type` is a name without a comma.
#define DLLM_SHARED(type, name) __shared__::std::type_identity_t<type> name
// The bytes in shared memory that the launch asks for.
#define DLLM_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#else
#include "simt/simt.h"
#define DLLM_SHARED(type, name)    \
  static const char name##_id = 0; \
  auto& name = *static_cast<::std::type_identity_t<type>*>(::dllm::simt::static_shared(&name##_id, sizeof(type)))
#define DLLM_DYNAMIC_SHARED(name) auto* name = static_cast<unsigned char*>(::dllm::simt::dynamic_shared())
#endif

namespace dllm::cuda {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int64_t kMaxCtas = 1 << 16;

// CTAs for a grid-stride loop over `num_items`.
inline unsigned num_ctas(int64_t num_items) {
  return static_cast<unsigned>(std::min((num_items + kThreads - 1) / kThreads, kMaxCtas));
}

struct Geometry {
  dim3 num_ctas;
  unsigned num_threads = kThreads;
  size_t shared_bytes = 0;  // DLLM_DYNAMIC_SHARED
};

// Launch a kernel; returns nullptr or the reason why the launch failed.
template <typename... Args>
const char* launch(void (*kernel)(Args...), const Geometry& geometry, [[maybe_unused]] Stream stream,
                   const std::type_identity_t<Args>&... args) {
#ifdef __CUDACC__
  constexpr size_t kWithoutOptIn = 48 << 10;
  if (geometry.shared_bytes > kWithoutOptIn) {
    const auto bytes = static_cast<int>(geometry.shared_bytes);
    const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (status != cudaSuccess) {
      return cudaGetErrorString(status);
    }
  }
  kernel<<<geometry.num_ctas, geometry.num_threads, geometry.shared_bytes, stream>>>(args...);
  const cudaError_t status = cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
#else
  return simt::run(geometry.num_ctas, geometry.num_threads, geometry.shared_bytes, [&] { kernel(args...); });
#endif
}

// A thread for each of the rows of the arguments: Put{}(args, row).
template <typename Put, typename Args>
__global__ void each_row(const Args args) {
  const auto first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t row = first; row < args.num_rows; row += static_cast<int64_t>(gridDim.x) * kThreads) {
    Put{}(args, row);
  }
}

// Launch it, unless there are no rows.
template <typename Put, typename Args>
const char* launch_rows(const Args& args, Stream stream) {
  if (args.num_rows == 0) {
    return nullptr;
  }
  return launch(each_row<Put, Args>, Geometry{.num_ctas = dim3{num_ctas(args.num_rows)}}, stream, args);
}

}  // namespace dllm::cuda
