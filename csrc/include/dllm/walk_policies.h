// The policies' rules for decide_walk: the score of a position, and how many positions a step unmasks.
//
// vllm_dllm/unmask/policy.py states them.
#pragma once

#include <cmath>

#include "dllm/credit.h"
#include "dllm/macros.h"
#include "dllm/splitmix.h"
#include "dllm/types.h"

namespace dllm {

// In the order of POLICIES in vllm_dllm/unmask/policy.py.
enum class Policy : int64_t {
  kStatic,
  kRandom,
  kThreshold,
  kFactor,
  kMargin,
  kEntropy,
  kOrigin,
  kSequential,
  kDynamic,
  kEntropyBounded,
  kCredit,
};

// All arrays are contiguous; rows are in the order of requests, nodes, positions, of the nodes that are evaluated.
struct DecideWalkArgs {
  const int64_t* canvas;  // [num_reqs, num_nodes, block_length], evaluated; node 0 is the root
  const bool* is_valid;   // [num_reqs, num_nodes], false for nodes that must not be accepted
  const int64_t* end;     // [num_reqs, block_length] of a look-ahead, whose next root is the last node; nullptr: none
  // [num_reqs, num_nodes], the place of a node among those evaluated; -1: it is not one, nor valid. nullptr: all are
  const int64_t* evaluated;

  const int64_t* token_ids;        // [num_rows], drawn
  const float* token_logits;       // [num_rows]
  const int64_t* top_ids;          // [num_rows, num_candidates], -1: none
  const float* top_logits;         // [num_rows, num_candidates]
  const double* rest;              // [num_rows], of the model's own distribution
  const double* weighted;          // [num_rows]
  const double* sampled_rest;      // [num_rows], of the sampled one; nullptr: policies look at the model's own
  const double* sampled_weighted;  // [num_rows]

  const int64_t* policy;        // [num_reqs], of the enum above
  const int64_t* seed;          // [num_reqs]
  const int64_t* prompt_len;    // [num_reqs]
  const int64_t* start;         // [num_reqs], absolute position of the root's block
  const double* threshold;      // [num_reqs]
  const double* factor;         // [num_reqs]
  const double* entropy_bound;  // [num_reqs], nats
  const double* credit_alpha;   // [num_reqs], as the next two of credit.h
  const double* credit_beta;    // [num_reqs]
  const double* credit_gamma;   // [num_reqs]
  const double* alg_temp;       // [num_reqs], 0 draws no positions
  const double* temperature;    // [num_reqs]
  const int64_t* counts;        // [block_length, num_reqs], schedule.count_table
  const double* times;          // [block_length, num_reqs], schedule.reveal_times

  // What kCredit remembers at the roots, and the logits of the ids in it. nullptr where no policy remembers anything.
  const int64_t* credit_ids;     // [num_reqs, block_length, kMaxCredited], -1: none
  const double* credits;         // [num_reqs, block_length, kMaxCredited]
  const float* credited_logits;  // [num_rows, kMaxCredited]

  int64_t* out_canvas;        // [num_reqs, block_length], of the root's block after the walk
  int64_t* out_next_canvas;   // [num_reqs, block_length], the same, or the next block's where the look-ahead came true
  int64_t* out_path;          // [num_reqs, num_nodes], the nodes decided, in order; -1 behind them
  int64_t* out_step;          // [num_reqs, block_length], place in the path that unmasked the position; -1: none
  int64_t* out_node;          // [num_reqs], the last of the path, 0 where it is empty
  int64_t* out_num_steps;     // [num_reqs], length of the path
  int64_t* out_num_unmasked;  // [num_reqs], positions, those of the next block included
  bool* out_is_finished;      // [num_reqs], the root's block
  bool* out_came_over;        // [num_reqs], whether the look-ahead came true
  int64_t* out_ids;           // [num_reqs, block_length, num_candidates] of out_node, 0 where there is none
  double* out_log_probs;      // [num_reqs, block_length, num_candidates], neither tempered nor filtered
  int64_t* out_credit_ids;    // [num_reqs, block_length, kMaxCredited], remembered of the block of out_next_canvas
  double* out_credits;        // [num_reqs, block_length, kMaxCredited]

  int64_t num_reqs;
  int64_t num_nodes;
  int64_t block_length;
  int64_t num_candidates;  // 2 or more
  int64_t mask_token_id;
  bool unmasks_first_alone;  // a block's first position is unmasked first, and alone
  int64_t sub_block_length;  // of parts of a block that are unmasked one after another; 0: it has none
};

// A canvas to decide.
struct WalkNode {
  int64_t request;
  int64_t node;
  int64_t start;  // absolute position of its block
};

// Behind the positions of a canvas that its next step may unmask: those of the leftmost stage that has masks.
DLLM_HOST_DEVICE inline int64_t stage_end(const DecideWalkArgs& args, const int64_t* canvas) {
  if (args.unmasks_first_alone && canvas[0] == args.mask_token_id) {
    return 1;
  }
  const int64_t part = args.sub_block_length;
  if (part == 0) {
    return args.block_length;
  }
  int64_t first = 0;
  while (first < args.block_length - 1 && canvas[first] != args.mask_token_id) {
    ++first;
  }
  const int64_t end = (first / part + 1) * part;
  return end < args.block_length ? end : args.block_length;
}

// Where the rows of a node begin; of one that is not evaluated they say nothing.
DLLM_HOST_DEVICE inline int64_t first_row(const DecideWalkArgs& args, const WalkNode& at) {
  const int64_t node = at.request * args.num_nodes + at.node;
  const int64_t place = args.evaluated == nullptr ? node : args.evaluated[node];
  return (place > 0 ? place : 0) * args.block_length;
}

// What the policies ask of the distribution of a row: that of probabilities ~ exp(x), x = 0 at the most probable id.
struct RowFacts {
  double rest;
  double weighted;
  double token;   // x of the drawn token
  double second;  // x of the second candidate

  DLLM_HOST_DEVICE double confidence() const { return std::exp(token) / (1.0 + rest); }
  DLLM_HOST_DEVICE double margin() const { return -std::expm1(second) / (1.0 + rest); }
  DLLM_HOST_DEVICE double certainty() const { return -(std::log1p(rest) - weighted / (1.0 + rest)); }
};

DLLM_HOST_DEVICE inline RowFacts row_facts(const DecideWalkArgs& args, int64_t request, int64_t row) {
  const float* top = args.top_logits + row * args.num_candidates;
  const double largest = static_cast<double>(top[0]);
  const double token = static_cast<double>(args.token_logits[row]) - largest;
  const double second = static_cast<double>(top[1]) - largest;
  if (args.sampled_rest == nullptr) {
    return {args.rest[row], args.weighted[row], token, second};
  }
  const double rest = args.sampled_rest[row];
  const double divisor = args.temperature[request] > 0.0 ? args.temperature[request] : 1.0;
  // Filters keep the best ids, so the second is left if any is.
  return {rest, args.sampled_weighted[row], token / divisor, rest == 0.0 ? -INFINITY : second / divisor};
}

// The step whose end is the first not after the position's own time.
DLLM_HOST_DEVICE inline double reveal_step(const DecideWalkArgs& args, int64_t request, int64_t position) {
  const double own_time = uniform(stream_key(args.seed[request], position, 0), kStream);
  int64_t step = 0;
  while (step < args.block_length && args.times[step * args.num_reqs + request] > own_time) {
    ++step;
  }
  return static_cast<double>(step);
}

DLLM_HOST_DEVICE inline double policy_score(const DecideWalkArgs& args, const WalkNode& at, int64_t offset) {
  const int64_t row = first_row(args, at) + offset;
  switch (static_cast<Policy>(args.policy[at.request])) {
    case Policy::kMargin:
      return row_facts(args, at.request, row).margin();
    case Policy::kEntropy:
    case Policy::kEntropyBounded:
      return row_facts(args, at.request, row).certainty();
    case Policy::kOrigin:
      return -reveal_step(args, at.request, at.start + offset);
    case Policy::kSequential:
      return -static_cast<double>(at.start + offset);
    default:
      return row_facts(args, at.request, row).confidence();
  }
}

// The score of a position when so many are masked, with the noise of `random` and of `alg_temp`.
DLLM_HOST_DEVICE inline double position_score(const DecideWalkArgs& args, const WalkNode& at, int64_t offset,
                                              int64_t num_masked) {
  const bool is_random = static_cast<Policy>(args.policy[at.request]) == Policy::kRandom;
  const double alg_temp = args.alg_temp[at.request];
  if (!is_random && !(alg_temp > 0.0)) {
    return policy_score(args, at, offset);
  }
  const double own = uniform(stream_key(args.seed[at.request], at.start + offset, num_masked), kStream);
  const double score = is_random ? own : policy_score(args, at, offset);
  if (!(alg_temp > 0.0)) {
    return score;
  }
  const double drawn = score / alg_temp + -std::log(-std::log(own));
  return drawn < -1.7976931348623157e308 ? -1.7976931348623157e308 : drawn;  // the quotient may overflow
}

// Whether a position comes before another one: by score, NaN first, then from left to right.
DLLM_HOST_DEVICE inline bool is_scored_before(const double* score, int64_t a, int64_t b) {
  const bool a_is_nan = score[a] != score[a];
  const bool b_is_nan = score[b] != score[b];
  if (a_is_nan || b_is_nan) {
    return a_is_nan && (!b_is_nan || a < b);
  }
  return score[a] != score[b] ? score[a] > score[b] : a < b;
}

DLLM_HOST_DEVICE inline CreditRow credit_row(const DecideWalkArgs& args, const WalkNode& at, int64_t offset) {
  const int64_t row = first_row(args, at) + offset;
  const double temperature = args.temperature[at.request];
  const bool is_sampled = args.sampled_rest != nullptr;
  return {
      .asked_ids = args.credit_ids + (at.request * args.block_length + offset) * kMaxCredited,
      .asked_logits = args.credited_logits + row * kMaxCredited,
      .top_ids = args.top_ids + row * args.num_candidates,
      .top_logits = args.top_logits + row * args.num_candidates,
      .num_candidates = args.num_candidates,
      .rest = args.rest[row],
      .drawn_rest = is_sampled ? args.sampled_rest[row] : args.rest[row],
      .divisor = is_sampled && temperature > 0.0 ? temperature : 1.0,
      .token_id = args.token_ids[row],
      .token_logit = args.token_logits[row],
      .temperature = temperature,
      .key = 0,
  };
}

DLLM_HOST_DEVICE inline bool remembers_credit(const DecideWalkArgs& args, int64_t request) {
  return args.credit_ids != nullptr && static_cast<Policy>(args.policy[request]) == Policy::kCredit;
}

// Whether a position's row has all that kCredit needs by now.
DLLM_HOST_DEVICE inline bool knows_credited(const DecideWalkArgs& args, const WalkNode& at, int64_t offset) {
  const int64_t place = (at.request * args.block_length + offset) * kMaxCredited;
  return knows_credited(credit_row(args, at, offset), args.out_credit_ids + place);
}

// Draw a position's token by its credit, and remember the credit.
DLLM_HOST_DEVICE inline CreditedToken draw_credited(const DecideWalkArgs& args, const WalkNode& at, int64_t offset,
                                                    int64_t num_masked) {
  const CreditRules rules = {args.credit_alpha[at.request], args.credit_beta[at.request],
                             args.credit_gamma[at.request]};
  CreditRow row = credit_row(args, at, offset);
  if (row.temperature > 0.0) {
    row.key = stream_key(args.seed[at.request], at.start + offset, num_masked);
  }
  const int64_t place = (at.request * args.block_length + offset) * kMaxCredited;
  return draw_credited(row, rules, args.out_credit_ids + place, args.out_credits + place);
}

DLLM_HOST_DEVICE inline int64_t scheduled_count(const DecideWalkArgs& args, const WalkNode& at, int64_t num_masked) {
  const int64_t known = args.prompt_len[at.request] - at.start;
  const int64_t num_unmasked = args.block_length - (known > 0 ? known : 0) - num_masked;
  const int64_t last = args.block_length - 1;
  return args.counts[(num_unmasked < last ? num_unmasked : last) * args.num_reqs + at.request];
}

// How many of the open positions a step unmasks, given their scores in descending order; at least one.
DLLM_HOST_DEVICE inline int64_t policy_count(const DecideWalkArgs& args, const WalkNode& at, const double* ordered,
                                             int64_t num_masked, int64_t num_open) {
  const double threshold = args.threshold[at.request];
  int64_t count = 0;
  switch (static_cast<Policy>(args.policy[at.request])) {
    case Policy::kThreshold:
    case Policy::kCredit:
      for (int64_t rank = 0; rank < num_open; ++rank) {
        count += ordered[rank] >= threshold;
      }
      break;
    case Policy::kDynamic: {
      for (int64_t rank = 0; rank < num_open; ++rank) {
        count += ordered[rank] > threshold;
      }
      const int64_t scheduled = scheduled_count(args, at, num_masked);
      count = count > scheduled ? count : scheduled;
      break;
    }
    case Policy::kFactor:
      // Rank 0 is always unmasked: Fast-dLLM's first threshold is -1. Failing at the last one alone unmasks it too.
      count = 1;
      while (count < num_open && !(ordered[count] < 1.0 - args.factor[at.request] / static_cast<double>(count + 2))) {
        ++count;
      }
      count += count == num_open - 1;
      break;
    case Policy::kEntropyBounded: {
      double sum = 0.0;
      for (int64_t rank = 0; rank < num_open; ++rank) {
        sum += -ordered[rank];
        count += sum < args.entropy_bound[at.request];
      }
      break;
    }
    case Policy::kOrigin:
      for (int64_t rank = 0; rank < num_open; ++rank) {
        count += ordered[rank] == ordered[0];
      }
      break;
    default:
      count = scheduled_count(args, at, num_masked);
  }
  return count > 1 ? count : 1;
}

}  // namespace dllm
