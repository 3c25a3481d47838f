// Statistics of rows in lanes: a tile of logits, one row per lane, into the partial statistics of a chunk.
#pragma once

#include "../vocab_stats.h"
#include "dllm/splitmix.h"
#include "vec.h"

#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace dllm::cpu::DLLM_ISA {

typedef uint64_t VecU64 __attribute__((vector_size(8 * kLanes)));

constexpr float kInfinity = __builtin_inff();
constexpr float kLog2E = 1.44269504f;
constexpr double kLn2 = 0.69314718055994531;
constexpr float kLowestLog2 = -127.0f;  // its exp2 is 0

inline VecI splat_id(int64_t id) { return static_cast<int32_t>(id) - VecI{}; }

// Bit i: a[i] > b[i].
inline uint32_t lanes_above(VecF a, VecF b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), _CMP_GT_OQ);
#elif defined(__AVX__)
  return _mm256_movemask_ps(_mm256_cmp_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), _CMP_GT_OQ));
#else
  const VecI is_above = a > b;
  uint32_t bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    bits |= static_cast<uint32_t>(is_above[lane] & 1) << lane;
  }
  return bits;
#endif
}

// A lower bound of log2(1 - uniform(key, id)), short by 0.09 or less unless that is below -20.
// uniform's leading 31 bits bound 1 - u from below; the bits of a float, read as an integer, bound its logarithm.
inline VecF low_log2_rest(VecU64 keys, int64_t id) {
  VecU64 x = keys + (static_cast<uint64_t>(id) + 1) * kGolden;
  x = (x ^ (x >> 30)) * kMix1;
  x = (x ^ (x >> 27)) * kMix2;
  x = x ^ (x >> 31);
  const VecI rest = 0x7FFFFFFF - __builtin_convertvector(x >> 33, VecI);
  const VecI bits = reinterpret_cast<VecI>(__builtin_convertvector(rest, VecF));
  return __builtin_convertvector(bits, VecF) * 0x1p-23f - (127.0f + 31.0f);
}

// The VocabSums of each lane, with log2(e) x instead of x.
struct LaneSums {
  double rest[kLanes], weighted[kLanes];

  VocabSums of(int lane) const { return {rest[lane], weighted[lane] * kLn2}; }
};

// kLanes rows. `floor` and `score` outlive a chunk: what an earlier chunk of the thread excels is in no result.
class VocabLanes {
 public:
  // rows: the lanes' rows; those from num_rows on stand for none.
  void begin(const VocabStatsArgs& args, const int64_t* rows, int64_t num_rows) {
    num_candidates_ = args.num_candidates;
    draws_ = false;
    for (int lane = 0; lane < kLanes; ++lane) {
      floor_[lane] = -kInfinity;
      const int64_t row = rows[lane < num_rows ? lane : 0];
      draws_here_[lane] = lane < num_rows && args.sampling.keys != nullptr && args.sampling.temperature[row] > 0 &&
                          !is_filtered(args.sampling, row);
      draws_ |= draws_here_[lane];
      key_[lane] = draws_here_[lane] ? static_cast<uint64_t>(args.sampling.keys[row]) : 0;
      temperature_[lane] = draws_here_[lane] ? args.sampling.temperature[row] : 1.0;
      slope_[lane] = over_temperature(kLog2E, temperature_[lane]);
      score_[lane] = -static_cast<double>(kInfinity);
      low_score_[lane] = draws_here_[lane] ? -kInfinity : kInfinity;
    }
    samples_ = draws_ && args.sampled_rest != nullptr;
  }

  void begin_chunk() {
    largest_ = splat(-kInfinity);
    largest_id_ = splat_id(-1);
    model_ = sampled_ = {};
    for (int lane = 0; lane < kLanes; ++lane) {
      token_id_[lane] = -1;
      for (int32_t place = 0; place < num_candidates_; ++place) {
        top_logit_[lane][place] = -kInfinity;
        top_id_[lane][place] = -1;
      }
    }
  }

  // Add the logits tile[i * stride + lane] of the ids first_id + i.
  void add(const float* tile, int64_t stride, int64_t first_id, int num_ids) {
    add_sums(tile, stride, first_id, num_ids);
    if (num_candidates_ > 1) {
      add_candidates(tile, stride, first_id, num_ids);
    }
    if (draws_) {
      draw(tile, stride, first_id, num_ids);
    }
  }

  void end_chunk(const int64_t* rows, int64_t num_rows, VocabPartial* partials) {
    for (int lane = 0; lane < num_rows && lane < kLanes; ++lane) {
      VocabPartial& partial = partials[rows[lane]];
      partial.model = model_.of(lane);
      partial.sampled = sampled_.of(lane);
      for (int32_t place = 0; place < kMaxCandidates; ++place) {
        const bool is_listed = place < num_candidates_;
        partial.top_logit[place] = is_listed ? top_logit_[lane][place] : -kInfinity;
        partial.top_id[place] = is_listed ? top_id_[lane][place] : -1;
      }
      partial.top_logit[0] = largest_[lane];  // listed only if it excels earlier chunks
      partial.top_id[0] = largest_id_[lane];
      const bool is_drawn = draws_here_[lane] && token_id_[lane] >= 0;
      partial.token_id = is_drawn ? token_id_[lane] : draws_here_[lane] ? -1 : largest_id_[lane];
      partial.token_logit = is_drawn ? token_logit_[lane] : draws_here_[lane] ? -kInfinity : largest_[lane];
      partial.score = is_drawn ? score_[lane] : static_cast<double>(partial.token_logit);
    }
  }

 private:
  void add_sums(const float* tile, int64_t stride, int64_t first_id, int num_ids) {
    const VecF before = largest_;
    for (int i = 0; i < num_ids; ++i) {
      const VecF logit = load(tile + i * stride);
      const VecI is_larger = logit > largest_;
      largest_ = is_larger ? logit : largest_;
      largest_id_ = is_larger ? splat_id(first_id + i) : largest_id_;
    }
    sum_up(model_, splat(kLog2E), before, tile, stride, first_id, num_ids);
    if (samples_) {
      sum_up(sampled_, load(slope_), before, tile, stride, first_id, num_ids);
    }
  }

  // before: the largest logits so far, to which `sums` belong.
  void sum_up(LaneSums& sums, VecF slope, VecF before, const float* tile, int64_t stride, int64_t first_id,
              int num_ids) const {
    const VecF base = largest_ == splat(-kInfinity) ? VecF{} : largest_;
    const auto log2_of = [&](VecF logit) { return max(splat(kLowestLog2), (logit - base) * slope); };
    VecF rest{}, weighted{};
    for (int i = 0; i < num_ids; ++i) {
      const VecF x = log2_of(load(tile + i * stride));
      const VecF mass = largest_id_ == splat_id(first_id + i) ? VecF{} : exp2(x);
      rest += mass;
      weighted += x * mass;
    }
    const VecF below = log2_of(before);
    const VecF scale = exp2(below);
    for (int lane = 0; lane < kLanes; ++lane) {
      if (largest_[lane] > before[lane]) {  // what was the largest joins the rest
        const double mass = scale[lane] * (1.0 + sums.rest[lane]);
        sums.weighted[lane] = scale[lane] * sums.weighted[lane] + below[lane] * mass;
        sums.rest[lane] = mass;
      }
      sums.rest[lane] += rest[lane];
      sums.weighted[lane] += weighted[lane];
    }
  }

  void add_candidates(const float* tile, int64_t stride, int64_t first_id, int num_ids) {
    for (int i = 0; i < num_ids; ++i) {
      const VecF logit = load(tile + i * stride);
      for (uint32_t above = lanes_above(logit, load(floor_)); above != 0; above &= above - 1) {
        const int lane = __builtin_ctz(above);
        insert(lane, logit[lane], static_cast<int32_t>(first_id + i));
      }
    }
  }

  void insert(int lane, float logit, int32_t id) {
    float* logits = top_logit_[lane];
    int32_t* ids = top_id_[lane];
    int32_t place = num_candidates_ - 1;
    for (; place > 0 && logit > logits[place - 1]; --place) {
      logits[place] = logits[place - 1];
      ids[place] = ids[place - 1];
    }
    logits[place] = logit;
    ids[place] = id;
    const float last = logits[num_candidates_ - 1];
    floor_[lane] = last > floor_[lane] ? last : floor_[lane];
  }

  // A score beats the best one if gumbel > (best - logit) / T. As gumbel <= -log(1 - u), most ids are out of the
  // question by 1 - u alone; the others get their exact score.
  void draw(const float* tile, int64_t stride, int64_t first_id, int num_ids) {
    const VecF margin = splat(1e-3f);  // of the float32 arithmetic below
    for (int i = 0; i < num_ids; ++i) {
      const int64_t id = first_id + i;
      const VecF logit = load(tile + i * stride);
      const VecF bound = (logit - load(low_score_)) * load(slope_) + margin;
      for (uint32_t open = lanes_above(bound, low_log2_rest(key_, id)); open != 0; open &= open - 1) {
        const int lane = __builtin_ctz(open);
        consider(lane, logit[lane], id);
      }
    }
  }

  void consider(int lane, float logit, int64_t id) {
    const double score = exact_score(logit, temperature_[lane], key_[lane], id);
    if (score > score_[lane]) {
      score_[lane] = score;
      token_logit_[lane] = logit;
      token_id_[lane] = static_cast<int32_t>(id);
      const float rounded = static_cast<float>(score);
      low_score_[lane] = rounded - (rounded < 0 ? -rounded : rounded) * 0x1p-22f;
    }
  }

  VecF largest_;
  VecI largest_id_;
  VecU64 key_;
  LaneSums model_, sampled_;
  double score_[kLanes], temperature_[kLanes];
  float floor_[kLanes];      // the last of num_candidates logits, of this chunk or of earlier ones
  float low_score_[kLanes];  // not above `score_`
  float slope_[kLanes];      // log2(e) / temperature
  float token_logit_[kLanes];
  int32_t token_id_[kLanes];
  float top_logit_[kLanes][kMaxCandidates];
  int32_t top_id_[kLanes][kMaxCandidates];
  bool draws_here_[kLanes];
  bool draws_;
  bool samples_;  // what is drawn from is summed up too
  int32_t num_candidates_;
};

}  // namespace dllm::cpu::DLLM_ISA
