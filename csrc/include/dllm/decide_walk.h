// decide_walk: from the root on, decide the next canvas, go to the node that has it, and repeat.
//
// What it computes is stated in vllm_dllm/unmask/walk.py and policy.py. Here are the rules of the policies and the walk
// of one request, for a team of threads; decide_walk.cpp and .cu bring the teams.
#pragma once

#include <cmath>
#include <cstddef>

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
};

// All arrays are contiguous; rows are in the order of requests, nodes, positions.
struct DecideWalkArgs {
  const int64_t* canvas;  // [num_reqs, num_nodes, block_length], evaluated; node 0 is the root
  const bool* is_valid;   // [num_reqs, num_nodes], false for nodes that must not be accepted
  const int64_t* end;     // [num_reqs, block_length] of a look-ahead, whose next root is the last node; nullptr: none

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
  const double* alg_temp;       // [num_reqs], 0 draws no positions
  const double* temperature;    // [num_reqs]
  const int64_t* counts;        // [block_length, num_reqs], schedule.count_table
  const double* times;          // [block_length, num_reqs], schedule.reveal_times

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

  int64_t num_reqs;
  int64_t num_nodes;
  int64_t block_length;
  int64_t num_candidates;  // 2 or more
  int64_t mask_token_id;
  bool unmasks_first_alone;  // a block's first step unmasks its first position alone
};

// What a team shares while it walks for a request.
struct WalkScratch {
  double* score;        // [block_length], of masked positions
  double* ordered;      // [block_length], the scores in descending order
  int64_t* canvas;      // [block_length], the next canvas of the node at hand
  int32_t* rank;        // [block_length], of masked positions
  int32_t* num_masked;  // of the node at hand
  int32_t* count;       // how many of them it unmasks
};

inline size_t walk_scratch_bytes(int64_t block_length) {
  return static_cast<size_t>(block_length) * (3 * sizeof(double) + sizeof(int32_t)) + 2 * sizeof(int32_t);
}

// Lay the scratch out in memory aligned for double.
DLLM_HOST_DEVICE inline WalkScratch make_walk_scratch(int64_t block_length, void* memory) {
  WalkScratch scratch = {};
  scratch.score = static_cast<double*>(memory);
  scratch.ordered = scratch.score + block_length;
  scratch.canvas = reinterpret_cast<int64_t*>(scratch.ordered + block_length);
  scratch.rank = reinterpret_cast<int32_t*>(scratch.canvas + block_length);
  scratch.num_masked = scratch.rank + block_length;
  scratch.count = scratch.num_masked + 1;
  return scratch;
}

// A canvas to decide.
struct WalkNode {
  int64_t request;
  int64_t node;
  int64_t start;  // absolute position of its block
};

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
  const int64_t row = (at.request * args.num_nodes + at.node) * args.block_length + offset;
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

DLLM_HOST_DEVICE inline int64_t scheduled_count(const DecideWalkArgs& args, const WalkNode& at, int64_t num_masked) {
  const int64_t known = args.prompt_len[at.request] - at.start;
  const int64_t num_unmasked = args.block_length - (known > 0 ? known : 0) - num_masked;
  const int64_t last = args.block_length - 1;
  return args.counts[(num_unmasked < last ? num_unmasked : last) * args.num_reqs + at.request];
}

// How many of the masked positions a step unmasks, given their scores in descending order; at least one.
DLLM_HOST_DEVICE inline int64_t policy_count(const DecideWalkArgs& args, const WalkNode& at, const double* ordered,
                                             int64_t num_masked) {
  const double threshold = args.threshold[at.request];
  int64_t count = 0;
  switch (static_cast<Policy>(args.policy[at.request])) {
    case Policy::kThreshold:
      for (int64_t rank = 0; rank < num_masked; ++rank) {
        count += ordered[rank] >= threshold;
      }
      break;
    case Policy::kDynamic: {
      for (int64_t rank = 0; rank < num_masked; ++rank) {
        count += ordered[rank] > threshold;
      }
      const int64_t scheduled = scheduled_count(args, at, num_masked);
      count = count > scheduled ? count : scheduled;
      break;
    }
    case Policy::kFactor:
      // Rank 0 is always unmasked: Fast-dLLM's first threshold is -1. Failing at the last one alone unmasks it too.
      count = 1;
      while (count < num_masked && !(ordered[count] < 1.0 - args.factor[at.request] / static_cast<double>(count + 2))) {
        ++count;
      }
      count += count == num_masked - 1;
      break;
    case Policy::kEntropyBounded: {
      double sum = 0.0;
      for (int64_t rank = 0; rank < num_masked; ++rank) {
        sum += -ordered[rank];
        count += sum < args.entropy_bound[at.request];
      }
      break;
    }
    case Policy::kOrigin:
      for (int64_t rank = 0; rank < num_masked; ++rank) {
        count += ordered[rank] == ordered[0];
      }
      break;
    default:
      count = scheduled_count(args, at, num_masked);
  }
  return count > 1 ? count : 1;
}

// Put the next canvas of a node into the scratch.
template <typename Team>
DLLM_HOST_DEVICE inline void decide(const DecideWalkArgs& args, const WalkScratch& scratch, const WalkNode& at,
                                    const Team& team) {
  const int64_t first = (at.request * args.num_nodes + at.node) * args.block_length;
  const int64_t* canvas = args.canvas + first;
  team.once([&] {
    *scratch.num_masked = 0;
    for (int64_t offset = 0; offset < args.block_length; ++offset) {
      *scratch.num_masked += canvas[offset] == args.mask_token_id;
    }
  });
  const int64_t num_masked = *scratch.num_masked;
  team.each(args.block_length, [&](int64_t offset) {
    if (canvas[offset] == args.mask_token_id) {
      scratch.score[offset] = position_score(args, at, offset, num_masked);
    }
  });
  team.each(args.block_length, [&](int64_t offset) {
    if (canvas[offset] == args.mask_token_id) {
      int32_t rank = 0;
      for (int64_t other = 0; other < args.block_length; ++other) {
        rank += canvas[other] == args.mask_token_id && is_scored_before(scratch.score, other, offset);
      }
      scratch.rank[offset] = rank;
      scratch.ordered[rank] = scratch.score[offset];
    }
  });
  team.once([&] { *scratch.count = static_cast<int32_t>(policy_count(args, at, scratch.ordered, num_masked)); });
  const bool takes_first = args.unmasks_first_alone && num_masked == args.block_length;
  team.each(args.block_length, [&](int64_t offset) {
    const bool is_masked = canvas[offset] == args.mask_token_id;
    const bool is_chosen = is_masked && (takes_first ? offset == 0 : scratch.rank[offset] < *scratch.count);
    scratch.canvas[offset] = is_chosen ? args.token_ids[first + offset] : canvas[offset];
  });
}

// Write the candidates of a node's rows.
template <typename Team>
DLLM_HOST_DEVICE inline void put_candidates(const DecideWalkArgs& args, const WalkNode& at, const Team& team) {
  team.each(args.block_length, [&](int64_t offset) {
    const int64_t row = (at.request * args.num_nodes + at.node) * args.block_length + offset;
    const int64_t out = (at.request * args.block_length + offset) * args.num_candidates;
    const int64_t* ids = args.top_ids + row * args.num_candidates;
    const float* logits = args.top_logits + row * args.num_candidates;
    for (int64_t place = 0; place < args.num_candidates; ++place) {
      const double below = static_cast<double>(logits[place]) - static_cast<double>(logits[0]);
      args.out_ids[out + place] = ids[place] < 0 ? 0 : ids[place];
      args.out_log_probs[out + place] = below - std::log1p(args.rest[row]);
    }
  });
}

// Walk for one request. All threads of a team call each of its functions, which return when all calls are done:
//   each(n, f): f(i) for i in 0..n-1,
//   once(f): f() in one thread,
//   any(n, f): whether f(i) is true for any i in 0..n-1,
//   find(num_nodes, n, f): the first node in 1..num_nodes-1 for which f(node, i) is true for all i in 0..n-1; num_nodes
//     where there is none.
template <typename Team>
DLLM_HOST_DEVICE inline void walk(const DecideWalkArgs& args, const WalkScratch& scratch, int64_t request,
                                  const Team& team) {
  const int64_t length = args.block_length;
  const int64_t num_nodes = args.num_nodes;
  const int64_t* root = args.canvas + request * num_nodes * length;
  const bool* is_valid = args.is_valid + request * num_nodes;
  int64_t* path = args.out_path + request * num_nodes;
  WalkNode at = {request, 0, args.start[request]};
  team.each(num_nodes, [&](int64_t node) { path[node] = -1; });
  team.each(length, [&](int64_t offset) {
    scratch.canvas[offset] = root[offset];
    args.out_step[request * length + offset] = -1;
  });
  const int64_t num_in_block = num_nodes - (args.end != nullptr);
  int64_t num_steps = 0;
  const auto has_masks = [&] {
    return team.any(length, [&](int64_t offset) { return scratch.canvas[offset] == args.mask_token_id; });
  };
  bool is_finished = !has_masks();
  bool goes_on = !is_finished;
  while (goes_on) {
    decide(args, scratch, at, team);
    const int64_t* canvas = args.canvas + (request * num_nodes + at.node) * length;
    team.each(length, [&](int64_t offset) {
      if (canvas[offset] != scratch.canvas[offset]) {
        args.out_step[request * length + offset] = num_steps;
      }
    });
    team.once([&] { path[num_steps] = at.node; });
    ++num_steps;
    is_finished = !has_masks();
    const int64_t found = team.find(num_in_block, length, [&](int64_t node, int64_t offset) {
      return is_valid[node] && root[node * length + offset] == scratch.canvas[offset];
    });
    // Canvases that follow each other in a circle, which no policy makes, end too.
    goes_on = !is_finished && found < num_in_block && num_steps < num_in_block;
    at.node = goes_on ? found : at.node;
  }
  const bool came_over =
      args.end != nullptr && is_finished && is_valid[num_nodes - 1] &&
      !team.any(length, [&](int64_t offset) { return args.end[request * length + offset] != scratch.canvas[offset]; });
  team.each(length, [&](int64_t offset) { args.out_canvas[request * length + offset] = scratch.canvas[offset]; });
  if (came_over) {
    at = {request, num_nodes - 1, at.start + length};
    decide(args, scratch, at, team);
    team.once([&] { path[num_steps] = at.node; });
    ++num_steps;
  }
  team.each(length, [&](int64_t offset) { args.out_next_canvas[request * length + offset] = scratch.canvas[offset]; });
  put_candidates(args, at, team);
  team.once([&] {
    int64_t num_unmasked = 0;
    for (int64_t offset = 0; offset < length; ++offset) {
      num_unmasked +=
          root[offset] == args.mask_token_id && args.out_canvas[request * length + offset] != args.mask_token_id;
      num_unmasked += came_over && scratch.canvas[offset] != args.mask_token_id;
    }
    args.out_node[request] = at.node;
    args.out_num_steps[request] = num_steps;
    args.out_num_unmasked[request] = num_unmasked;
    args.out_is_finished[request] = is_finished;
    args.out_came_over[request] = came_over;
  });
}

namespace cpu {
void decide_walk(const DecideWalkArgs& args);
}

namespace cuda {
const char* decide_walk(const DecideWalkArgs& args, Stream stream);
}

}  // namespace dllm
