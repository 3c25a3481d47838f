// What CUDA C++ offers a kernel, for g++: the kernels' sources run on a CPU, each thread a fiber (README.md).
//
// CTAs run one after the other, the threads of a CTA in turns: a thread runs until it waits for its warp or its CTA.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

#define __global__
#define __device__
#define __launch_bounds__(...)

inline dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the running thread; threads of a CTA are numbered by x alone

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace dllm::simt {

constexpr int kWarp = 32;
constexpr size_t kMaxExchange = 64;  // bytes that a lane hands to its warp

// Run `thread` for every thread of every CTA. Returns nullptr or the first fault.
const char* run(dim3 grid, unsigned num_threads, size_t shared_bytes, const std::function<void()>& thread);

// End the launch with a fault of the running thread.
[[noreturn]] void fail(const char* what);

// Wait for all threads of the CTA.
void wait_for_cta();

// Wait for all lanes of the warp at the same operation; returns what each handed over, [kWarp] of kMaxExchange bytes,
// valid until the lane's next exchange but one.
const std::byte* exchange(const char* operation, const void* value, size_t bytes);

// Shared memory, poisoned for each CTA: the dynamic part, and one array for each variable.
void* dynamic_shared();
void* static_shared(const void* variable, size_t bytes);

// Asynchronous copies of the running thread. Until its wait the destination is poisoned.
void copy_async(void* to, const void* from, size_t bytes, size_t zero_bytes);
void commit_copies();
void wait_for_copies(size_t pending_groups);

// What every lane of the warp gave.
template <typename T>
class Lanes {
 public:
  Lanes(const char* operation, const T& value) : values_(exchange(operation, &value, sizeof(T))) {
    static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= kMaxExchange);
  }
  const T& operator[](unsigned lane) const { return *reinterpret_cast<const T*>(values_ + lane * kMaxExchange); }

 private:
  const std::byte* values_;
};

inline unsigned lane() { return threadIdx.x % kWarp; }

inline void check_mask(unsigned mask) {
  if (mask != 0xffffffffu) {
    fail("a warp operation has a mask other than 0xffffffff, which is not emulated");
  }
}

template <typename T, typename Source>
T shuffle(const char* operation, unsigned mask, T value, int width, Source source) {
  check_mask(mask);
  const Lanes<T> lanes(operation, value);
  const int first = static_cast<int>(lane()) / width * width;
  const int from = source(static_cast<int>(lane()) - first);
  return from < 0 || from >= width ? value : lanes[first + from];
}

template <typename T, typename Combine>
T reduce(const char* operation, unsigned mask, T value, Combine combine) {
  check_mask(mask);
  const Lanes<T> lanes(operation, value);
  T result = lanes[0];
  for (int i = 1; i < kWarp; ++i) {
    result = combine(result, lanes[i]);
  }
  return result;
}

}  // namespace dllm::simt

inline void __syncthreads() { dllm::simt::wait_for_cta(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  dllm::simt::check_mask(mask);
  dllm::simt::exchange("__syncwarp", nullptr, 0);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
  return dllm::simt::shuffle("__shfl_sync", mask, value, width, [=](int) { return from % width; });
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  return dllm::simt::shuffle("__shfl_xor_sync", mask, value, width, [=](int lane) { return lane ^ lanes; });
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int lanes, int width = 32) {
  return dllm::simt::shuffle("__shfl_up_sync", mask, value, width, [=](int lane) { return lane - lanes; });
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const unsigned bit = (predicate != 0 ? 1u : 0u) << dllm::simt::lane();
  return dllm::simt::reduce("__ballot_sync", mask, bit, std::bit_or<>());
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == 0xffffffffu; }
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  return dllm::simt::reduce("__reduce_max_sync", mask, value, [](unsigned a, unsigned b) { return std::max(a, b); });
}

template <typename T>
T atomicMax(T* to, std::type_identity_t<T> value) {
  const T before = *to;
  *to = std::max(before, value);
  return before;
}

inline int __clz(int bits) { return std::countl_zero(static_cast<unsigned>(bits)); }
inline int __ffs(int bits) { return bits == 0 ? 0 : std::countr_zero(static_cast<unsigned>(bits)) + 1; }
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
using std::max;
using std::min;
