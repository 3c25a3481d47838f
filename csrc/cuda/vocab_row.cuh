// What the kernels of vocab_stats share: reading a row, logits as ordered keys, reductions of a CTA.
#pragma once

#include <cmath>

#include "dllm/vocab_partial.h"
#include "float16.cuh"

namespace dllm::cuda {

constexpr int kGroup = 4;  // ids that a thread reads at a time

template <typename Float>
struct alignas(kGroup * sizeof(Float)) Group {
  Float logits[kGroup];
};

// Read the logits at [index, index + kGroup) of a row; those excluded, not allowed or beyond its end are -inf.
template <typename Float>
__device__ inline void read_group(const VocabStatsArgs& args, const Float* row, int64_t number, int64_t index,
                                  float* logits) {
  const bool is_whole =
      index + kGroup <= args.num_ids && reinterpret_cast<uintptr_t>(row + index) % sizeof(Group<Float>) == 0;
  Group<Float> group = {};
  if (is_whole) {
    group = *reinterpret_cast<const Group<Float>*>(row + index);
  }
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    if (!is_whole && index + i < args.num_ids) {
      group.logits[i] = row[index + i];
    }
    logits[i] = index + i < args.num_ids ? to_float(group.logits[i]) : -INFINITY;
  }
  for (int32_t e = 0; e < args.num_excluded; ++e) {
    const int64_t place = args.excluded_ids[e] - args.first_id - index;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      logits[i] = i == place ? -INFINITY : logits[i];
    }
  }
  if (args.allowed != nullptr) {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const bool is_there = index + i < args.num_ids;
      logits[i] = is_there && is_allowed(args, number, args.first_id + index + i) ? logits[i] : -INFINITY;
    }
  }
}

// The logit of an id, as read_group reads it; -inf if the row has none.
template <typename Float>
__device__ inline float read_logit(const VocabStatsArgs& args, const Float* row, int64_t number, int64_t id) {
  const int64_t index = id - args.first_id;
  if (index < 0 || index >= args.num_ids || !is_allowed(args, number, id)) {
    return -INFINITY;
  }
  for (int32_t e = 0; e < args.num_excluded; ++e) {
    if (args.excluded_ids[e] == id) {
      return -INFINITY;
    }
  }
  return to_float(row[index]);
}

// A number that orders logits as they are ordered; 0 for what is no candidate, -inf and NaN.
__device__ inline uint32_t key_of(float logit) {
  const uint32_t bits = __float_as_uint(logit + 0.0f);  // -0 becomes 0
  const uint32_t key = (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
  return logit > -INFINITY ? key : 0;
}

__device__ inline float logit_of(uint32_t key) {
  return key == 0 ? -INFINITY : __uint_as_float((key >> 31) != 0 ? key ^ 0x80000000u : ~key);
}

__device__ inline uint64_t warp_max(uint64_t value) {
  const auto high = static_cast<uint32_t>(value >> 32);
  const uint32_t max_high = __reduce_max_sync(kAllLanes, high);
  const uint32_t max_low = __reduce_max_sync(kAllLanes, high == max_high ? static_cast<uint32_t>(value) : 0u);
  return static_cast<uint64_t>(max_high) << 32 | max_low;
}

// The maximum over a CTA of kNumWarps warps. Calls in a row use different `slots`; a barrier between two uses of one.
template <int kNumWarps>
__device__ inline uint64_t cta_max(uint64_t value, uint64_t (&slots)[kNumWarps]) {
  const uint64_t largest = warp_max(value);
  if (threadIdx.x % kWarp == 0) {
    slots[threadIdx.x / kWarp] = largest;
  }
  __syncthreads();
  uint64_t result = slots[0];
  for (int warp = 1; warp < kNumWarps; ++warp) {
    result = slots[warp] > result ? slots[warp] : result;
  }
  return result;
}

template <typename Number>
__device__ inline Number warp_sum(Number value) {
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, lanes);
  }
  return value;
}

}  // namespace dllm::cuda
