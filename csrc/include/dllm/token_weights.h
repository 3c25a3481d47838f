// Token weights: how likely each candidate of a position is, given what became known beside it. Stated in
// vllm_dllm/draft/token_weights.py.
#pragma once

#include <cmath>

#include "dllm/macros.h"
#include "dllm/types.h"

namespace dllm {

constexpr int kNumBeside = 4;

struct TokenWeights {
  double slope;
  double slope_beside_new;
  double same[kNumBeside];  // of the neighbours at -1, 1, -2, 2
};

// No candidate counts as less probable.
constexpr double kLeastLogProb = -20.0;

// A candidate, and the logarithm of its probability.
struct Guess {
  uint8_t candidate;
  double log_prob;
};

// The candidate of a vocab rank. Of candidates with equal scores the more probable is the better one.
//
// `token_ids`, `log_probs`: [num_candidates], most probable first; `beside`: tokens of the new neighbours, -1 for none.
DLLM_HOST_DEVICE inline Guess weighed_guess(const TokenWeights& weights, const int64_t* token_ids,
                                            const double* log_probs, int32_t num_candidates,
                                            const int64_t (&beside)[kNumBeside], int32_t vocab_rank) {
  double scores[kMaxCandidates];
  const bool is_beside_new = beside[0] >= 0 || beside[1] >= 0;
  const double scale = is_beside_new ? weights.slope + weights.slope_beside_new : weights.slope;
  double largest = -HUGE_VAL;
  for (int c = 0; c < num_candidates; ++c) {
    const bool is_possible = log_probs[c] > -HUGE_VAL;  // else it is no token, whatever its id is
    double added = 0.0;
    for (int i = 0; i < kNumBeside; ++i) {
      added += is_possible && beside[i] == token_ids[c] ? weights.same[i] : 0.0;
    }
    scores[c] = scale * (log_probs[c] > kLeastLogProb ? log_probs[c] : kLeastLogProb) + added;
    largest = scores[c] > largest ? scores[c] : largest;
  }
  int chosen = 0;
  double sum = 0.0;
  for (int c = 0; c < num_candidates; ++c) {
    int32_t rank = 0;
    for (int other = 0; other < num_candidates; ++other) {
      rank += scores[other] > scores[c] || (scores[other] == scores[c] && other < c);
    }
    chosen = rank == vocab_rank ? c : chosen;
    sum += std::exp(scores[c] - largest);
  }
  return {static_cast<uint8_t>(chosen), scores[chosen] - largest - std::log(sum)};
}

}  // namespace dllm
