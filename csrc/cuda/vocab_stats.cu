// Three launches: where the filters cut each row (vocab_cut.cuh), the statistics of each segment of a row, their merge.
#include "dllm/vocab_stats.h"

#include "dllm/vocab_partial.h"
#include "launch.h"
#include "vocab_cut.cuh"
#include "vocab_row.cuh"

namespace dllm::cuda {
namespace {

constexpr int kNumWarps = kThreads / kWarp;
constexpr int kIdsPerThread = 32;                   // held in registers from the first reading on
constexpr int kSegment = kThreads * kIdsPerThread;  // ids of a CTA: 16 CTAs per row at LLaDA's 126,464 ids
static_assert(kSegment % kVocabChunk == 0);         // so there are no more segments than partials
constexpr float kSlack = 1.001f;                    // over all roundings of the bound in `may_exceed`

struct Drawn {
  double score;
  int32_t offset;  // in the segment; -1: none
};

struct SegmentShared {
  uint64_t slots[2][kNumWarps];
  VocabSums sums[2][kNumWarps];
  Drawn drawn[kNumWarps];
};

// One segment of a row, as its CTA sees it.
template <typename Float>
struct Segment {
  const VocabStatsArgs& args;
  const Float* logits_of_row;
  int64_t row;
  int64_t begin;  // of the segment, index in the row
  SegmentShared& shared;

  __device__ int64_t group_begin(int group) const {
    return begin + (static_cast<int64_t>(group) * kThreads + threadIdx.x) * kGroup;
  }

  // A key and its offset as a number that orders candidates, the lowest id first of equal ones; 0 for none.
  __device__ static uint64_t candidate(uint32_t key, int32_t offset) {
    return key == 0 ? 0 : static_cast<uint64_t>(key) << 32 | ~static_cast<uint32_t>(offset);
  }

  __device__ int32_t offset_of(int i) const {
    return static_cast<int32_t>(group_begin(i / kGroup) - begin) + i % kGroup;
  }

  // The best candidate of a thread that comes after `bound`.
  __device__ uint64_t best_after(const float (&logits)[kIdsPerThread], uint64_t bound) const {
    const auto bound_key = static_cast<uint32_t>(bound >> 32);
    const auto bound_offset = static_cast<int32_t>(~static_cast<uint32_t>(bound));
    uint32_t best_key = 0;
    int32_t best_offset = -1;
#pragma unroll
    for (int i = 0; i < kIdsPerThread; ++i) {
      const uint32_t key = key_of(logits[i]);
      const bool is_after = key < bound_key || (key == bound_key && offset_of(i) > bound_offset);
      if (is_after && key > best_key) {  // the offsets of a thread ascend
        best_key = key;
        best_offset = offset_of(i);
      }
    }
    return candidate(best_key, best_offset);
  }

  // Find the best candidates in order; returns the first.
  __device__ uint64_t put_top(const float (&logits)[kIdsPerThread], VocabPartial& partial) const {
    uint64_t own = best_after(logits, ~uint64_t{0});
    uint64_t first = 0;
    for (int32_t place = 0; place < args.num_candidates; ++place) {
      const uint64_t best = cta_max(own, shared.slots[place % 2]);
      first = place == 0 ? best : first;
      if (threadIdx.x == 0) {
        const auto index = static_cast<int32_t>(begin + static_cast<int64_t>(~static_cast<uint32_t>(best)));
        partial.top_logit[place] = logit_of(static_cast<uint32_t>(best >> 32));
        partial.top_id[place] = best == 0 ? -1 : static_cast<int32_t>(args.first_id) + index;
      }
      if (own == best && best != 0) {
        own = best_after(logits, best);
      }
    }
    return first;
  }

  // Sum up exponentials of all kept candidates but the first.
  __device__ void put_sums(const float (&logits)[kIdsPerThread], uint64_t first, float inverse_temperature, Cut cut,
                           VocabSums (&slots)[kNumWarps], VocabSums& result) const {
    const float largest = logit_of(static_cast<uint32_t>(first >> 32));
    const auto first_offset = static_cast<int32_t>(~static_cast<uint32_t>(first));  // -1 where there is none
    const auto last_offset = static_cast<int32_t>(min(max(cut.index - begin, int64_t{-1}), int64_t{kSegment}));
    float rest = 0.0f;
    float weighted = 0.0f;
#pragma unroll
    for (int i = 0; i < kIdsPerThread; ++i) {
      const float x = (logits[i] - largest) * inverse_temperature;
      const bool is_cut = logits[i] < cut.logit || (logits[i] == cut.logit && offset_of(i) > last_offset);
      const bool is_left_out = is_cut || logits[i] == -INFINITY || offset_of(i) == first_offset;
      const float mass = is_left_out ? 0.0f : std::exp(x);
      rest += mass;
      weighted += mass == 0.0f ? 0.0f : x * mass;
    }
    const double warp_rest = warp_sum(static_cast<double>(rest));
    const double warp_weighted = warp_sum(static_cast<double>(weighted));
    if (threadIdx.x % kWarp == 0) {
      slots[threadIdx.x / kWarp] = {warp_rest, warp_weighted};
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      VocabSums sums = {cut.keeps(largest, begin + first_offset) ? 0.0 : -1.0, 0.0};
      for (int warp = 0; warp < kNumWarps; ++warp) {
        sums.rest += slots[warp].rest;
        sums.weighted += slots[warp].weighted;
      }
      result = sums;
    }
  }

  // Whether an id's score may exceed `best`; false only if it does not for sure. Gumbel noise of the uniform number u
  // exceeds t only if 1 - u < 1 - exp(-exp(-t)) < exp(-t); the comparison lets a NaN pass.
  __device__ static bool may_exceed(float logit, float best, float inverse_temperature, uint64_t key, int64_t id) {
    const uint64_t bits = mix(key + (static_cast<uint64_t>(id) + 1) * kGolden) >> 12;
    const float above = (static_cast<float>((uint64_t{1} << 52) - 1 - bits) + 0.5f) * 0x1p-52f;
    return !(above > kSlack * std::exp((logit - best) * inverse_temperature));
  }

  __device__ static Drawn better(Drawn a, Drawn b) {
    const bool is_b = b.offset >= 0 && (b.score > a.score || (b.score == a.score && b.offset < a.offset));
    return a.offset < 0 || is_b ? b : a;
  }

  __device__ static Drawn warp_best(Drawn own) {
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
      const Drawn other = {__shfl_xor_sync(kAllLanes, own.score, lanes), __shfl_xor_sync(kAllLanes, own.offset, lanes)};
      own = better(own, other);
    }
    return own;
  }

  // The best score of a warp's ids. Exact scores, two logarithms in float64, are made of the few ids that may be it.
  __device__ Drawn draw_warp(double temperature, Cut cut) const {
    const auto key = static_cast<uint64_t>(args.sampling.keys[row]);
    const auto inverse_temperature = static_cast<float>(1.0 / temperature);
    Drawn best = {-INFINITY, -1};
    float best_score = -INFINITY;
#pragma unroll 1
    for (int group = 0; group < kIdsPerThread / kGroup; ++group) {
      float logits[kGroup];
      read_group(args, logits_of_row, row, group_begin(group), logits);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const int64_t index = group_begin(group) + i;
        const int64_t id = args.first_id + index;
        const bool may_win =
            cut.keeps(logits[i], index) && may_exceed(logits[i], best_score, inverse_temperature, key, id);
        if (__any_sync(kAllLanes, may_win)) {
          const double score = may_win ? vocab_score(logits[i], temperature, key, id) : -INFINITY;
          const Drawn own = {score, score > -INFINITY ? static_cast<int32_t>(index - begin) : -1};
          best = better(best, warp_best(own));
          best_score = static_cast<float>(best.score);
          best_score -= std::abs(best_score) * 0x1p-22f;  // below the score, however it was rounded
        }
      }
    }
    return best;
  }

  __device__ void put_drawn(VocabPartial& partial, double temperature, Cut cut) const {
    const Drawn warp_drawn = draw_warp(temperature, cut);
    if (threadIdx.x % kWarp == 0) {
      shared.drawn[threadIdx.x / kWarp] = warp_drawn;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      Drawn drawn = shared.drawn[0];
      for (int warp = 1; warp < kNumWarps; ++warp) {
        drawn = better(drawn, shared.drawn[warp]);
      }
      const int64_t index = begin + drawn.offset;
      partial.score = drawn.score;
      partial.token_id = drawn.offset < 0 ? -1 : static_cast<int32_t>(args.first_id + index);
      partial.token_logit = drawn.offset < 0 ? -INFINITY : to_float(logits_of_row[index]);
    }
  }
};

// One CTA per segment of a row.
template <typename Float>
__global__ void __launch_bounds__(kThreads) vocab_segment_kernel(VocabStatsArgs args, int num_segments) {
  DLLM_SHARED(SegmentShared, shared);
  const int64_t row = blockIdx.x / num_segments;
  const int64_t number = blockIdx.x % num_segments;
  const Float* data = static_cast<const Float*>(args.rows) + row * args.row_stride;
  const Segment<Float> segment = {args, data, row, number * kSegment, shared};
  VocabPartial& partial = args.partials[number * args.num_rows + row];

  float logits[kIdsPerThread];
#pragma unroll
  for (int i = 0; i < kIdsPerThread; i += kGroup) {
    read_group(args, data, row, segment.group_begin(i / kGroup), logits + i);
  }
  const uint64_t first = segment.put_top(logits, partial);
  segment.put_sums(logits, first, 1.0f, kNoCut, shared.sums[0], partial.model);

  const double temperature = args.sampling.keys == nullptr ? 0.0 : args.sampling.temperature[row];
  if (temperature > 0.0) {
    const bool has_cut = args.sampling.top_k != nullptr;
    const Cut cut = has_cut ? Cut{args.token_logits[row], args.token_ids[row]} : kNoCut;
    if (args.sampled_rest != nullptr) {
      segment.put_sums(logits, first, over_temperature(1.0, temperature), cut, shared.sums[1], partial.sampled);
    }
    segment.put_drawn(partial, temperature, cut);
  } else if (threadIdx.x == 0) {
    partial.token_id = partial.top_id[0];
    partial.token_logit = partial.top_logit[0];
    partial.score = partial.top_logit[0];
  }
  if (number == 0 && threadIdx.x < args.num_given) {
    const int64_t place = row * args.num_given + threadIdx.x;
    args.given_logits[place] = read_logit(args, data, row, args.given_ids[place]);
  }
}

// One warp per row: each lane merges consecutive segments, then neighbours merge, so the order is always the same.
__global__ void vocab_merge_kernel(VocabStatsArgs args, int num_segments) {
  DLLM_SHARED(VocabPartial[kWarp], merged);
  const int64_t row = blockIdx.x;
  const int lane = static_cast<int>(threadIdx.x);
  const int per_lane = (num_segments + kWarp - 1) / kWarp;
  const double temperature = sampled_temperature(args, row);
  VocabPartial own = empty_partial();
  for (int number = lane * per_lane; number < min((lane + 1) * per_lane, num_segments); ++number) {
    merge_partial(own, args.partials[number * args.num_rows + row], args.num_candidates, temperature);
  }
  merged[lane] = own;
  for (int lanes = 1; lanes < kWarp; lanes *= 2) {
    __syncwarp();
    if (lane % (2 * lanes) == 0) {
      merge_partial(merged[lane], merged[lane + lanes], args.num_candidates, temperature);
    }
  }
  if (lane == 0) {
    put_partial(args, row, merged[0]);
  }
}

template <typename Float>
const char* launch_all(const VocabStatsArgs& args, Stream stream) {
  const auto num_rows = static_cast<unsigned>(args.num_rows);
  const auto num_segments = static_cast<int>((args.num_ids + kSegment - 1) / kSegment);
  const char* error = nullptr;
  if (args.sampling.top_k != nullptr) {
    const Geometry geometry = {.num_ctas = dim3{num_rows}, .num_threads = kCutThreads, .shared_bytes = kCutBytes};
    error = launch(vocab_cut_kernel<Float>, geometry, stream, args);
  }
  if (error == nullptr) {
    error = launch(vocab_segment_kernel<Float>, {.num_ctas = dim3{num_rows * static_cast<unsigned>(num_segments)}},
                   stream, args, num_segments);
  }
  if (error == nullptr) {
    error = launch(vocab_merge_kernel, {.num_ctas = dim3{num_rows}, .num_threads = kWarp}, stream, args, num_segments);
  }
  return error;
}

}  // namespace

const char* vocab_stats(const VocabStatsArgs& args, Stream stream) {
  switch (args.type) {
    case FloatType::kFloat32:
      return launch_all<float>(args, stream);
    case FloatType::kFloat16:
      return launch_all<Half>(args, stream);
    case FloatType::kBFloat16:
      return launch_all<BFloat16>(args, stream);
  }
  return "unknown type of logits";
}

}  // namespace dllm::cuda
