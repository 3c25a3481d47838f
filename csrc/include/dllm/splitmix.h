// Counter-based noise: the C++ side of vllm_dllm/noise.py, bit for bit, on host and device.
//
// SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014): element `counter` of the
// stream `key` is mix(key + counter * kGolden). All arithmetic is modulo 2^64.
#pragma once

#include <cstdint>

#include "dllm/macros.h"

namespace dllm {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15ull;
constexpr uint64_t kMix1 = 0xBF58476D1CE4E5B9ull;
constexpr uint64_t kMix2 = 0x94D049BB133111EBull;

DLLM_HOST_DEVICE inline uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * kMix1;
  x = (x ^ (x >> 27)) * kMix2;
  return x ^ (x >> 31);
}

// The uniform number of vocabulary id `id` in the stream `key`: 52 random bits, centred, in the open interval (0, 1).
// Each step is exact: bits < 2^52, so bits + 0.5 needs 53 bits, and the product is by a power of two.
DLLM_HOST_DEVICE inline double uniform(uint64_t key, int64_t id) {
  const uint64_t bits = mix(key + (static_cast<uint64_t>(id) + 1) * kGolden) >> 12;
  return (static_cast<double>(bits) + 0.5) * 0x1p-52;
}

// The id that reads a stream's own number instead of a vocabulary entry's.
constexpr int64_t kStream = -1;

// The stream of a row of noise: the request's seed, the absolute position, and the positions that are masked.
DLLM_HOST_DEVICE inline uint64_t stream_key(int64_t seed, int64_t position, int64_t num_masked) {
  uint64_t key = mix(static_cast<uint64_t>(seed) + kGolden);
  key = mix((key ^ static_cast<uint64_t>(position)) + kGolden);
  return mix((key ^ static_cast<uint64_t>(num_masked)) + kGolden);
}

}  // namespace dllm
