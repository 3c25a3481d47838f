// top_k and top_p of vocab_stats: where the kept ids of a row end, in the order of logits descending, ids ascending.
//
// Weights of ids (1, or the tempered probability in fixed point) are summed by digits of their keys, as a radix sort
// counts, so that the last key within a wanted sum is found in 8 readings of the row without sorting it. Integer sums
// do not depend on their order. Probabilities are float32, so which id is the last may differ from float64 where a sum
// meets top_p to 1e-6.
#pragma once

#include "vocab_row.cuh"

namespace dllm::cuda {

constexpr int kCutThreads = 512;
constexpr int kCutWarps = kCutThreads / kWarp;
constexpr int kDigitBits = 4;
constexpr int kDigits = 1 << kDigitBits;
constexpr size_t kCutBytes = sizeof(uint64_t) * kDigits * kCutThreads;  // a sum for each digit and thread: no atomics

// The ids that are kept: those with a larger logit, and of equal ones those up to `index`.
struct Cut {
  float logit;
  int64_t index;

  __device__ bool keeps(float other, int64_t its_index) const {
    return other > logit || (other == logit && its_index <= index);
  }
};

constexpr int64_t kNoIndex = INT64_MAX;
constexpr Cut kNoCut = {-INFINITY, kNoIndex};

struct CutShared {
  uint64_t totals[kDigits];
  uint64_t slots[kCutWarps];
};

struct Selected {
  uint32_t key;     // the largest one that, with all larger ones, has the wanted weight
  uint64_t before;  // weight that is left to want of this key's ids
  uint64_t at;      // weight of this key's ids
};

// One row and what its CTA selects with.
template <typename Float>
struct Selection {
  const VocabStatsArgs& args;
  const Float* row;
  int64_t number;  // of the row
  uint64_t* sums;  // [kDigits, kCutThreads]
  CutShared& shared;

  template <typename Call>
  __device__ void for_each(Call call) const {
    for (int64_t index = threadIdx.x * kGroup; index < args.num_ids; index += kCutThreads * kGroup) {
      float logits[kGroup];
      read_group(args, row, number, index, logits);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        call(logits[i], index + i);
      }
    }
  }

  __device__ float largest() const {
    uint32_t key = 0;
    for_each([&](float logit, int64_t) { key = max(key, key_of(logit)); });
    return logit_of(static_cast<uint32_t>(cta_max(key, shared.slots)));
  }

  // Sum up by threads what each digit got.
  __device__ void sum_digits() const {
    __syncthreads();
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    for (int digit = static_cast<int>(threadIdx.x) / kWarp; digit < kDigits; digit += kCutWarps) {
      uint64_t sum = 0;
      for (int thread = lane; thread < kCutThreads; thread += kWarp) {
        sum += sums[digit * kCutThreads + thread];
      }
      sum = warp_sum(sum);
      if (lane == 0) {
        shared.totals[digit] = sum;
      }
    }
    __syncthreads();
  }

  // Find the last key within a weight. `key(logit, index)`: 0 for none; `weight(logit)`; `wanted(total)`: the weight
  // wanted of all there is, 1 to total.
  template <typename Key, typename Weight, typename Wanted>
  __device__ Selected select(Key key, Weight weight, Wanted wanted) const {
    Selected selected = {};
    for (int shift = 32 - kDigitBits; shift >= 0; shift -= kDigitBits) {
      uint64_t* own = sums + threadIdx.x;
      for (int digit = 0; digit < kDigits; ++digit) {
        own[digit * kCutThreads] = 0;
      }
      const uint32_t prefix_mask = static_cast<uint32_t>(~uint64_t{0} << (shift + kDigitBits));
      for_each([&](float logit, int64_t index) {
        const uint32_t its_key = key(logit, index);
        if (its_key != 0 && (its_key & prefix_mask) == selected.key) {
          own[(its_key >> shift & (kDigits - 1)) * kCutThreads] += weight(logit);
        }
      });
      sum_digits();
      if (prefix_mask == 0) {
        uint64_t total = 0;
        for (int digit = 0; digit < kDigits; ++digit) {
          total += shared.totals[digit];
        }
        selected.before = wanted(total);
      }
      int digit = kDigits - 1;
      for (; digit > 0 && shared.totals[digit] < selected.before; --digit) {
        selected.before -= shared.totals[digit];
      }
      selected.key |= static_cast<uint32_t>(digit) << shift;
      selected.at = shared.totals[digit];
    }
    return selected;
  }

  // The key of the k-th largest logit.
  __device__ uint32_t top_k_key(uint64_t top_k) const {
    const auto key = [](float logit, int64_t) { return key_of(logit); };
    const auto wanted = [=](uint64_t total) { return top_k < total ? top_k : total; };
    return select(key, [](float) { return uint64_t{1}; }, wanted).key;
  }

  // Of the logits from `lowest_key` on, where the set ends whose tempered probability reaches top_p.
  __device__ Cut top_p_cut(uint32_t lowest_key, float largest, double top_p, double temperature) const {
    const auto inverse_temperature = static_cast<float>(1.0 / temperature);
    const auto one = static_cast<float>(uint64_t{1} << (__clz(static_cast<int>(args.num_ids)) + 29));  // sums < 2^62
    const auto weight = [=](float logit) {
      const float below = logit - largest;
      return static_cast<uint64_t>(below == 0.0f ? one : one * std::exp(below * inverse_temperature));
    };
    const auto key = [=](float logit, int64_t) { return key_of(logit) >= lowest_key ? key_of(logit) : 0u; };
    const auto wanted = [=](uint64_t total) {
      const auto share = static_cast<uint64_t>(std::ceil(top_p * static_cast<double>(total)));
      return share < 1 ? 1 : share < total ? share : total;
    };
    const Selected last = select(key, weight, wanted);
    const Cut cut = {logit_of(last.key), kNoIndex};
    const uint64_t each = weight(cut.logit);
    const uint64_t num_equal = (last.before + each - 1) / each;
    if (num_equal * each >= last.at) {
      return cut;
    }
    // The order of equal logits: the lowest index has the largest key.
    const auto key_of_index = [=](float logit, int64_t index) {
      return logit == cut.logit ? ~static_cast<uint32_t>(index) : 0u;
    };
    const auto count = [=](uint64_t) { return num_equal; };
    return {cut.logit, ~select(key_of_index, [](float) { return uint64_t{1}; }, count).key};
  }
};

// One CTA per row. The cut waits for `vocab_segment_kernel` where the row's token will be.
template <typename Float>
__global__ void __launch_bounds__(kCutThreads) vocab_cut_kernel(VocabStatsArgs args) {
  DLLM_DYNAMIC_SHARED(memory);
  DLLM_SHARED(CutShared, shared);
  const int64_t row = blockIdx.x;
  const double temperature = args.sampling.temperature[row];
  const double top_p = args.sampling.top_p[row];
  const int64_t top_k = args.sampling.top_k[row];
  const Float* logits = static_cast<const Float*>(args.rows) + row * args.row_stride;
  const Selection<Float> selection = {args, logits, row, reinterpret_cast<uint64_t*>(memory), shared};
  Cut cut = kNoCut;
  if (temperature > 0.0 && (top_k > 0 || top_p < 1.0)) {
    const float largest = selection.largest();
    const bool has_candidates = largest > -INFINITY && largest < INFINITY;
    if (has_candidates && top_k > 0) {
      cut.logit = logit_of(selection.top_k_key(static_cast<uint64_t>(top_k)));
    }
    if (has_candidates && top_p < 1.0) {
      const uint32_t lowest_key = top_k > 0 ? key_of(cut.logit) : 1;
      cut = selection.top_p_cut(lowest_key, largest, top_p, temperature);
    }
  }
  if (threadIdx.x == 0) {
    args.token_logits[row] = cut.logit;
    args.token_ids[row] = cut.index;
  }
}

}  // namespace dllm::cuda
