// The work of propose_nodes for one request, in pieces that a thread does alone: a position of a draw, a node. So the
// CPU and a CTA make the same numbers by the same operations, whoever does a piece.
//
// The nodes that start from canvases with as many positions unmasked share a *draw*: what the step from there would put
// at each position, and how ready the positions are. Order of work: `begin_position` of all positions; then for each
// draw `draw_position` of all masked positions, their order into `ranked`, `fill_node` of its nodes; at last
// `put_draft` of all nodes; with a look-ahead, `rank_end` and `put_end` of all positions. Without noise all draws are
// the same.
#pragma once

#include <cmath>
#include <cstddef>

#include "dllm/macros.h"
#include "dllm/propose_nodes.h"
#include "dllm/splitmix.h"
#include "dllm/walk_policies.h"

namespace dllm {

// What a node holds at a position: the candidate it puts there, or one of these.
constexpr uint8_t kOpen = 255;   // the mask token
constexpr uint8_t kKnown = 254;  // the root's token

// Sums over positions have an order that a warp can keep: lane i adds i, i + kSumLanes, ...; then the second half of
// the lanes is added to the first, and so on.
constexpr int32_t kSumLanes = 32;

// What is sorted must not be NaN, whatever the probabilities are.
DLLM_HOST_DEVICE inline double number_or_least(double value) { return value == value ? value : -HUGE_VAL; }

// Memory of one request. Node 0 is the root, i + 1 the node that lies at i.
struct ProposeScratch {
  double* log_reach;  // [1 + num_nodes]
  double* worst;      // [1 + num_nodes], least corrected log_reach on the way to the node
  double* log_z;      // [1 + num_nodes], log_choices of the node's canvas, where several threads need it
  double* ready;      // [block_length], readiness, of the draw
  double* order;      // [block_length], what the position rank follows, of the draw
  int32_t* num_open;  // [1 + num_nodes], masked positions; 0 for a node that may not be evaluated
  int32_t* ranked;    // [num_open of the root], its masked positions by rank, of the draw
  uint8_t* pick;      // [block_length, kMaxCandidates], the candidate of each vocab rank, of the draw
  uint8_t* kept;      // [block_length], bit c: top_k and top_p leave candidate c
  uint8_t* filled;    // [1 + num_nodes, block_length]
};

DLLM_HOST_DEVICE inline size_t scratch_bytes(const ProposeNodesArgs& args) {
  const auto nodes = static_cast<size_t>(args.num_nodes) + 1;
  const auto positions = static_cast<size_t>(args.block_length);
  return nodes * (3 * sizeof(double) + sizeof(int32_t) + positions) +
         positions * (2 * sizeof(double) + sizeof(int32_t) + kMaxCandidates + 1);
}

// `memory`: scratch_bytes, aligned for double.
DLLM_HOST_DEVICE inline ProposeScratch make_scratch(const ProposeNodesArgs& args, void* memory) {
  const int32_t nodes = args.num_nodes + 1;
  const int32_t positions = args.block_length;
  ProposeScratch scratch;
  scratch.log_reach = static_cast<double*>(memory);
  scratch.worst = scratch.log_reach + nodes;
  scratch.log_z = scratch.worst + nodes;
  scratch.ready = scratch.log_z + nodes;
  scratch.order = scratch.ready + positions;
  scratch.num_open = reinterpret_cast<int32_t*>(scratch.order + positions);
  scratch.ranked = scratch.num_open + nodes;
  scratch.pick = reinterpret_cast<uint8_t*>(scratch.ranked + positions);
  scratch.kept = scratch.pick + static_cast<int64_t>(positions) * kMaxCandidates;
  scratch.filled = scratch.kept + positions;
  return scratch;
}

struct Proposal {
  const ProposeNodesArgs& args;
  ProposeScratch scratch;
  int64_t request;

  DLLM_HOST_DEVICE int64_t slot() const { return args.slots[request]; }
  DLLM_HOST_DEVICE double temperature() const { return args.policy == nullptr ? 0.0 : args.temperature[slot()]; }
  DLLM_HOST_DEVICE bool is_random() const {
    return args.policy != nullptr && static_cast<Policy>(args.policy[slot()]) == Policy::kRandom;
  }

  // Whether draws differ.
  DLLM_HOST_DEVICE bool is_noisy() const { return temperature() > 0.0 || is_random(); }

  DLLM_HOST_DEVICE int64_t at(int32_t position) const { return slot() * args.block_length + position; }
  DLLM_HOST_DEVICE bool is_masked(int32_t position) const { return args.canvas[at(position)] == args.mask_token_id; }
  // Whether the next step may unmask a position: in the leftmost part with masks. Guesses beyond could not come true.
  DLLM_HOST_DEVICE bool is_open(int32_t position) const {
    const int64_t part = args.sub_block_length;
    if (!is_masked(position) || part == 0) {
      return is_masked(position);
    }
    int32_t first = 0;
    while (!is_masked(first)) {
      ++first;
    }
    return position / part == first / part;
  }
  DLLM_HOST_DEVICE bool is_new(int32_t position) const { return args.was_masked[at(position)] && !is_masked(position); }
  DLLM_HOST_DEVICE uint8_t* filled(int32_t node) const {
    return scratch.filled + static_cast<int64_t>(node) * args.block_length;
  }
  DLLM_HOST_DEVICE const double* log_probs(int32_t position) const {
    return args.log_probs + at(position) * args.num_candidates;
  }

  // Which candidates top_k and top_p leave of the tempered distribution, as far as the candidates show it; the first
  // one always.
  DLLM_HOST_DEVICE uint8_t kept_candidates(int32_t position) const {
    const double* log_prob = log_probs(position);
    const double scale = temperature() > 1e-9 ? temperature() : 1e-9;
    const int64_t top_k = args.top_k[slot()];
    const int64_t num_kept = top_k > 0 && top_k < args.num_candidates ? top_k : args.num_candidates;
    double mass[kMaxCandidates];
    double total = 0.0;
    for (int c = 0; c < num_kept; ++c) {
      mass[c] = std::exp(log_prob[c] / scale - log_prob[0] / scale);
      total += mass[c];
    }
    int kept = 1;
    double sum = mass[0] / total;
    for (int c = 1; c < num_kept; ++c) {
      const double share = mass[c] / total;
      sum += share;
      kept |= static_cast<int>(share > 0.0 && sum - share < args.top_p[slot()]) << c;
    }
    return static_cast<uint8_t>(kept);
  }

  DLLM_HOST_DEVICE void begin_position(int32_t position) const {
    filled(0)[position] = is_open(position) ? kOpen : kKnown;
    scratch.kept[position] = temperature() > 0.0 ? kept_candidates(position) : 0;
    put_token(0, position, args.canvas[at(position)]);
    if (position == 0) {
      put_canvas(0, true, 0);
    }
  }

  // Order the candidates by Gumbel-max, equal ones as they are, and keep as many as there are vocab ranks.
  DLLM_HOST_DEVICE void pick_candidates(int32_t position, uint64_t key) const {
    double scores[kMaxCandidates];
    for (int c = 0; c < args.num_candidates; ++c) {
      const double number = uniform(key, args.token_ids[at(position) * args.num_candidates + c]);
      const bool is_kept = (scratch.kept[position] >> c & 1) != 0;
      scores[c] = is_kept ? log_probs(position)[c] - temperature() * std::log(-std::log(number)) : -HUGE_VAL;
    }
    int taken = 0;
    for (int rank = 0; rank < args.num_vocab_ranks; ++rank) {
      int best = -1;
      for (int c = 0; c < args.num_candidates; ++c) {
        if ((taken >> c & 1) == 0 && (best < 0 || scores[c] > scores[best])) {
          best = c;
        }
      }
      taken |= 1 << best;
      scratch.pick[position * kMaxCandidates + rank] = static_cast<uint8_t>(best);
    }
  }

  // The readiness that neighbours add which are new, by `is_new(position)`.
  template <typename IsNew>
  DLLM_HOST_DEVICE double near(int32_t position, IsNew is_new) const {
    double sum = 0.0;
    for (int32_t distance = 1; distance <= 2; ++distance) {
      const double weight = args.readiness.near[distance - 1];
      sum += position >= distance && is_new(position - distance) ? weight : 0.0;
      sum += position + distance < args.block_length && is_new(position + distance) ? weight : 0.0;
    }
    for (int32_t distance = 1; args.terms != nullptr && distance <= kReach; ++distance) {
      const double* middle = term(position);
      sum += position >= distance && is_new(position - distance) ? middle[-distance] : 0.0;
      sum += position + distance < args.block_length && is_new(position + distance) ? middle[distance] : 0.0;
    }
    return sum;
  }

  // What a ranker adds to the readiness of a position; beside it, to what neighbours add.
  DLLM_HOST_DEVICE const double* term(int32_t position) const {
    return args.terms + (request * args.block_length + position) * (1 + 2 * kReach) + kReach;
  }

  DLLM_HOST_DEVICE double readiness(int32_t position, double log_confidence) const {
    const double below_zero = log_confidence < -1e-12 ? log_confidence : -1e-12;
    const double logit = below_zero - std::log(-std::expm1(below_zero));
    const double near_new = near(position, [this](int32_t other) { return is_new(other); });
    const double ready = args.readiness.slope * logit + near_new + args.readiness.bias;
    return args.terms == nullptr ? ready : ready + *term(position);
  }

  DLLM_HOST_DEVICE uint64_t noise_key(int32_t position, int64_t num_masked) const {
    return stream_key(args.seed[slot()], args.start[request] + position, num_masked);
  }

  // `num_masked`: how many positions are masked in the canvases that the draw starts from.
  DLLM_HOST_DEVICE void draw_position(int32_t position, int64_t num_masked) const {
    const uint64_t key = is_noisy() ? noise_key(position, num_masked) : uint64_t{0};
    if (temperature() > 0.0) {
      pick_candidates(position, key);
    } else {
      for (int rank = 0; rank < args.num_vocab_ranks; ++rank) {
        scratch.pick[position * kMaxCandidates + rank] = static_cast<uint8_t>(rank);
      }
    }
    scratch.ready[position] = readiness(position, log_probs(position)[scratch.pick[position * kMaxCandidates]]);
    scratch.order[position] = number_or_least(is_random() ? uniform(key, kStream) : scratch.ready[position]);
  }

  // Whether masked position a has a better rank than b.
  DLLM_HOST_DEVICE bool is_before(int32_t a, int32_t b) const {
    const double left = scratch.order[a];
    const double right = scratch.order[b];
    return left > right || (left == right && a < b);
  }

  // Readiness where `canvas` is the canvas at hand: what it adds to the root is new.
  DLLM_HOST_DEVICE double ready_in(const uint8_t* canvas, int32_t position) const {
    return scratch.ready[position] + near(position, [=](int32_t other) { return canvas[other] < kKnown; });
  }

  // The largest readiness of the open positions lane, lane + kSumLanes, ... of a canvas.
  DLLM_HOST_DEVICE double largest_ready(const uint8_t* canvas, int32_t lane) const {
    double largest = -HUGE_VAL;
    for (int32_t position = lane; position < args.block_length; position += kSumLanes) {
      const double ready = canvas[position] == kOpen ? ready_in(canvas, position) : -HUGE_VAL;
      largest = ready > largest ? ready : largest;
    }
    return largest;
  }

  // What these positions add to the sum of `log_choices`. `largest`: of all open positions.
  DLLM_HOST_DEVICE double sum_choices(const uint8_t* canvas, int32_t lane, double largest) const {
    double sum = 0.0;
    for (int32_t position = lane; position < args.block_length; position += kSumLanes) {
      if (canvas[position] != kOpen) {
        continue;
      }
      const double ready = ready_in(canvas, position);
      if (args.is_one_by_one) {
        sum += std::exp(ready - largest);
      } else {
        sum += ready > 20.0 ? ready : std::log1p(std::exp(ready));  // as torch's softplus
      }
    }
    return sum;
  }

  // The logarithm of the sum of exp(readiness) over all choices that a step from a canvas has (draft/prune.py).
  DLLM_HOST_DEVICE double log_choices(double sum, double largest) const {
    return args.is_one_by_one ? largest + std::log(sum) : sum + std::log(-std::expm1(-sum));
  }

  // The position of a rank among those that are masked in `canvas`; -1 where there are fewer.
  DLLM_HOST_DEVICE int32_t ranked_position(const uint8_t* canvas, int32_t rank) const {
    for (int32_t i = 0; i < scratch.num_open[0]; ++i) {
      rank -= canvas[scratch.ranked[i]] == kOpen;
      if (rank < 0) {
        return scratch.ranked[i];
      }
    }
    return -1;
  }

  // The token that a canvas has new at a position; -1 where there is none, and outside the block.
  DLLM_HOST_DEVICE int64_t new_token(const uint8_t* canvas, int32_t position) const {
    if (position < 0 || position >= args.block_length) {
      return -1;
    }
    if (canvas[position] < kKnown) {
      return args.token_ids[at(position) * args.num_candidates + canvas[position]];
    }
    return is_new(position) ? args.canvas[at(position)] : -1;
  }

  // What a step from a canvas puts at a position.
  DLLM_HOST_DEVICE Guess guess(const uint8_t* canvas, int32_t position, int32_t vocab_rank) const {
    if (args.has_token_weights && !(temperature() > 0.0)) {
      const int64_t beside[kNumBeside] = {new_token(canvas, position - 1), new_token(canvas, position + 1),
                                          new_token(canvas, position - 2), new_token(canvas, position + 2)};
      return weighed_guess(args.token_weights, args.token_ids + at(position) * args.num_candidates, log_probs(position),
                           args.num_candidates, beside, vocab_rank);
    }
    const uint8_t candidate = scratch.pick[position * kMaxCandidates + vocab_rank];
    return {candidate, log_probs(position)[candidate]};
  }

  // Fill node `index` + 1 from its parent. `log_z`: log_choices of the parent's canvas, not used where the order is
  // random.
  DLLM_HOST_DEVICE void fill_node(int32_t index, double log_z) const {
    const GraphNode& node = args.nodes[index];
    const uint8_t* from = filled(node.parent);
    uint8_t* canvas = filled(index + 1);
    for (int32_t position = 0; position < args.block_length; ++position) {
      canvas[position] = from[position];
    }
    int32_t num_open = scratch.num_open[node.parent];
    double log_step = is_random() ? 0.0 : -log_z;
    for (int32_t i = index == 0 ? 0 : args.nodes[index - 1].end_pair; i < node.end_pair; ++i) {
      const int32_t position = ranked_position(from, args.pairs[i].position_rank);
      if (position < 0) {
        num_open = 0;
        break;
      }
      const Guess found = guess(from, position, args.pairs[i].vocab_rank);
      canvas[position] = found.candidate;
      log_step += found.log_prob + (is_random() ? 0.0 : ready_in(from, position));
      --num_open;
    }
    const bool is_valid = scratch.num_open[node.parent] > 0 && num_open > 0;
    scratch.num_open[index + 1] = is_valid ? num_open : 0;
    const double log_reach = is_valid ? scratch.log_reach[node.parent] + log_step : -HUGE_VAL;
    const double score = number_or_least(log_reach + args.log_correction[index]);
    scratch.log_reach[index + 1] = log_reach;
    scratch.worst[index + 1] = scratch.worst[node.parent] < score ? scratch.worst[node.parent] : score;
  }

  // Write a token of a canvas.
  DLLM_HOST_DEVICE void put_token(int64_t canvas, int32_t position, int64_t token) const {
    const int64_t out = (request * args.num_canvases + canvas) * args.block_length + position;
    args.out_canvas[out] = token;
    args.out_is_masked[out] = token == args.mask_token_id;
  }

  DLLM_HOST_DEVICE void put_canvas(int64_t canvas, bool is_valid, int64_t depth) const {
    args.out_is_valid[request * args.num_canvases + canvas] = is_valid;
    args.out_depth[request * args.num_canvases + canvas] = depth;
  }

  // Write node `index` + 1 to its place among the drafts, if it has one.
  DLLM_HOST_DEVICE void put_draft(int32_t index) const {
    const GraphNode& node = args.nodes[index];
    const double worst = scratch.worst[index + 1];
    int32_t place = 0;
    for (int32_t other = 0; other < args.num_nodes; ++other) {
      const double its = scratch.worst[other + 1];
      place += its > worst || (its == worst && args.nodes[other].number < node.number);
    }
    if (place >= args.num_drafts) {
      return;
    }
    put_canvas(1 + place, args.is_known[slot()] && scratch.num_open[index + 1] > 0, node.depth);
    const int64_t draft = request * args.num_drafts + place;
    args.out_node[draft] = node.number;
    args.out_log_reach[draft] = scratch.log_reach[index + 1];
    const uint8_t* canvas = filled(index + 1);
    for (int32_t position = 0; position < args.block_length; ++position) {
      const bool is_filled = canvas[position] < kKnown;
      put_token(1 + place, position,
                is_filled ? args.token_ids[at(position) * args.num_candidates + canvas[position]]
                          : args.canvas[at(position)]);
    }
  }

  // Order the masked positions by the readiness of their likeliest tokens.
  DLLM_HOST_DEVICE void rank_end(int32_t position) const {
    scratch.order[position] = number_or_least(readiness(position, log_probs(position)[0]));
  }

  // The likeliest token of a position: at a temperature the one that its draw will give, if positions become ready in
  // that order, or, where steps unmask as many as they like, if the next step unmasks all.
  DLLM_HOST_DEVICE int64_t end_token(int32_t position) const {
    if (filled(0)[position] != kOpen) {
      return args.canvas[at(position)];
    }
    int candidate = 0;
    if (temperature() > 0.0) {
      int64_t num_masked = scratch.num_open[0];
      for (int32_t other = 0; args.is_one_by_one && other < args.block_length; ++other) {
        num_masked -= filled(0)[other] == kOpen && is_before(other, position);
      }
      pick_candidates(position, noise_key(position, num_masked));
      candidate = scratch.pick[position * kMaxCandidates];
    }
    return args.token_ids[at(position) * args.num_candidates + candidate];
  }

  // Write a position of the look-ahead.
  DLLM_HOST_DEVICE void put_end(int32_t position) const {
    args.out_end[request * args.block_length + position] = end_token(position);
    put_token(args.num_canvases - 1, position, args.mask_token_id);
    if (position == 0) {
      const bool has_next = args.start[request] + args.block_length < args.seq_len[slot()];
      put_canvas(args.num_canvases - 1, args.is_known[slot()] && has_next, scratch.num_open[0]);
    }
  }
};

}  // namespace dllm
