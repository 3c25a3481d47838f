// The algebra of vocab_stats' partial statistics, for host and device: the empty one, insertion, merge, result.
#pragma once

#include <cmath>

#include "dllm/macros.h"
#include "dllm/splitmix.h"
#include "dllm/vocab_stats.h"

namespace dllm {

DLLM_HOST_DEVICE inline VocabPartial empty_partial() {
  VocabPartial empty = {};
  empty.score = -INFINITY;
  empty.token_logit = -INFINITY;
  empty.token_id = -1;
  for (int32_t place = 0; place < kMaxCandidates; ++place) {
    empty.top_logit[place] = -INFINITY;
    empty.top_id[place] = -1;
  }
  return empty;
}

// The score of an id, as torch makes it: the product and the sum are rounded apart.
DLLM_HOST_DEVICE inline double vocab_score(float logit, double temperature, uint64_t key, int64_t id) {
  const double noise = temperature * -std::log(-std::log(uniform(key, id)));
  return static_cast<double>(logit) + noise;
}

// Put a logit among the num_candidates best; ids come in ascending order, so that an equal one stays behind.
DLLM_HOST_DEVICE inline void insert_top(float* top_logit, int32_t* top_id, int32_t num_candidates, float logit,
                                        int32_t id) {
  int32_t place = num_candidates;
  while (place > 0 && logit > top_logit[place - 1]) {
    if (place < num_candidates) {
      top_logit[place] = top_logit[place - 1];
      top_id[place] = top_id[place - 1];
    }
    --place;
  }
  if (place < num_candidates) {
    top_logit[place] = logit;
    top_id[place] = id;
  }
}

// Join sums of two sets of ids, of which the lower's best is at x = `below`; at -inf there is none.
DLLM_HOST_DEVICE inline VocabSums join(const VocabSums& upper, const VocabSums& lower, double below) {
  const double scale = std::exp(below);
  const double mass = scale * (1.0 + lower.rest);  // of all ids of the lower, NaN if it holds one
  const double weighted = upper.weighted + scale * lower.weighted + (scale == 0.0 ? mass : below * mass);
  return {upper.rest + mass, weighted};
}

// Add the statistics of later ids to those of earlier ones, the sampled ones at a temperature above 0.
DLLM_HOST_DEVICE inline void merge_partial(VocabPartial& into, const VocabPartial& later, int32_t num_candidates,
                                           double temperature) {
  const bool is_larger = later.top_logit[0] > into.top_logit[0];
  const VocabPartial& upper = is_larger ? later : into;
  const VocabPartial& lower = is_larger ? into : later;
  const bool is_empty = lower.top_logit[0] == -INFINITY;
  const double below = is_empty ? -INFINITY : static_cast<double>(lower.top_logit[0]) - upper.top_logit[0];
  into.model = join(upper.model, lower.model, below);
  if (temperature > 0.0) {
    into.sampled = join(upper.sampled, lower.sampled, below / temperature);
  }
  if (later.score > into.score) {
    into.score = later.score;
    into.token_logit = later.token_logit;
    into.token_id = later.token_id;
  }
  for (int32_t place = 0; place < num_candidates; ++place) {
    insert_top(into.top_logit, into.top_id, num_candidates, later.top_logit[place], later.top_id[place]);
  }
}

// Write a row's token, the first id if there is none.
DLLM_HOST_DEVICE inline void put_token(const VocabStatsArgs& args, int64_t row, const VocabPartial& partial) {
  args.token_ids[row] = partial.token_id < 0 ? args.first_id : partial.token_id;
  args.token_logits[row] = partial.token_logit;
  args.scores[row] = partial.score;
}

// Write a row's sums over what it draws from.
DLLM_HOST_DEVICE inline void put_sampled(const VocabStatsArgs& args, int64_t row, const VocabSums& sums) {
  args.sampled_rest[row] = sums.rest;
  args.sampled_weighted[row] = sums.weighted;
}

// Write a row's results.
DLLM_HOST_DEVICE inline void put_partial(const VocabStatsArgs& args, int64_t row, const VocabPartial& partial) {
  for (int32_t place = 0; place < args.num_candidates; ++place) {
    args.top_ids[row * args.num_candidates + place] = partial.top_id[place];
    args.top_logits[row * args.num_candidates + place] = partial.top_logit[place];
  }
  args.rest[row] = partial.model.rest;
  args.weighted[row] = partial.model.weighted;
  if (args.sampled_rest != nullptr) {
    put_sampled(args, row, sampled_temperature(args, row) > 0.0 ? partial.sampled : partial.model);
  }
  put_token(args, row, partial);
}

}  // namespace dllm
