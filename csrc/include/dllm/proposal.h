// The work of propose_nodes for one request, in pieces that a thread does alone: a position of a draw, a node. So the
// CPU and a CTA make the same numbers by the same operations, whoever does a piece.
//
// The nodes that start from canvases with as many positions unmasked share a *draw*: what the step from there would put
// at each position, and how ready the positions are. Order of work: `begin_position` of all positions; then for each
// draw `draw_position` of all masked positions, their order into `ranked`, `fill_node` of its nodes; at last
// `put_draft` of all nodes. Without noise all draws are the same.
#pragma once

#include <cmath>
#include <cstddef>

#include "dllm/macros.h"
#include "dllm/propose_nodes.h"
#include "dllm/splitmix.h"

namespace dllm {

// What a node holds at a position: the candidate it puts there, or one of these.
constexpr uint8_t kOpen = 255;   // the mask token
constexpr uint8_t kKnown = 254;  // the root's token

// What is sorted must not be NaN, whatever the probabilities are.
DLLM_HOST_DEVICE inline double number_or_least(double value) { return value == value ? value : -HUGE_VAL; }

// Memory of one request. Node 0 is the root, i + 1 the node that lies at i.
struct ProposeScratch {
  double* log_reach;  // [1 + num_nodes]
  double* worst;      // [1 + num_nodes], least corrected log_reach on the way to the node
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
  return nodes * (2 * sizeof(double) + sizeof(int32_t) + positions) +
         positions * (2 * sizeof(double) + sizeof(int32_t) + kMaxCandidates + 1);
}

// `memory`: scratch_bytes, aligned for double.
DLLM_HOST_DEVICE inline ProposeScratch make_scratch(const ProposeNodesArgs& args, void* memory) {
  const int32_t nodes = args.num_nodes + 1;
  const int32_t positions = args.block_length;
  ProposeScratch scratch;
  scratch.log_reach = static_cast<double*>(memory);
  scratch.worst = scratch.log_reach + nodes;
  scratch.ready = scratch.worst + nodes;
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

  DLLM_HOST_DEVICE double temperature() const { return args.seed == nullptr ? 0.0 : args.temperature[request]; }
  DLLM_HOST_DEVICE bool is_random() const { return args.seed != nullptr && args.is_random[request]; }

  // Whether draws differ.
  DLLM_HOST_DEVICE bool is_noisy() const { return temperature() > 0.0 || is_random(); }

  DLLM_HOST_DEVICE int64_t at(int32_t position) const { return request * args.block_length + position; }
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
    const int64_t top_k = args.top_k[request];
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
      kept |= static_cast<int>(share > 0.0 && sum - share < args.top_p[request]) << c;
    }
    return static_cast<uint8_t>(kept);
  }

  DLLM_HOST_DEVICE void begin_position(int32_t position) const {
    filled(0)[position] = args.is_masked[at(position)] ? kOpen : kKnown;
    scratch.kept[position] = temperature() > 0.0 ? kept_candidates(position) : 0;
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
    return sum;
  }

  // `num_masked`: how many positions are masked in the canvases that the draw starts from.
  DLLM_HOST_DEVICE void draw_position(int32_t position, int64_t num_masked) const {
    const uint64_t key =
        is_noisy() ? stream_key(args.seed[request], args.position[at(position)], num_masked) : uint64_t{0};
    if (temperature() > 0.0) {
      pick_candidates(position, key);
    } else {
      for (int rank = 0; rank < args.num_vocab_ranks; ++rank) {
        scratch.pick[position * kMaxCandidates + rank] = static_cast<uint8_t>(rank);
      }
    }
    const double log_confidence = log_probs(position)[scratch.pick[position * kMaxCandidates]];
    const double below_zero = log_confidence < -1e-12 ? log_confidence : -1e-12;
    const double logit = below_zero - std::log(-std::expm1(below_zero));
    const bool* is_new = args.is_new + at(0);
    const double near_new = near(position, [=](int32_t other) { return is_new[other]; });
    scratch.ready[position] = args.readiness.slope * logit + near_new + args.readiness.bias;
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

  // The logarithm of the sum of exp(readiness) over all choices that a step from `node` has (draft/prune.py).
  DLLM_HOST_DEVICE double log_choices(int32_t node) const {
    const uint8_t* canvas = filled(node);
    double largest = -HUGE_VAL;
    double sum = 0.0;
    for (int32_t position = 0; position < args.block_length; ++position) {
      if (canvas[position] != kOpen) {
        continue;
      }
      const double ready = ready_in(canvas, position);
      if (!args.is_one_by_one) {
        sum += ready > 20.0 ? ready : std::log1p(std::exp(ready));  // as torch's softplus
      } else if (ready <= largest) {
        sum += std::exp(ready - largest);
      } else {
        sum = sum * std::exp(largest - ready) + 1.0;
        largest = ready;
      }
    }
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

  // Fill node `index` + 1 from its parent. `log_z`: log_choices of the parent, not used where the order is random.
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
      canvas[position] = scratch.pick[position * kMaxCandidates + args.pairs[i].vocab_rank];
      log_step += log_probs(position)[canvas[position]] + (is_random() ? 0.0 : ready_in(from, position));
      --num_open;
    }
    const bool is_valid = scratch.num_open[node.parent] > 0 && num_open > 0;
    scratch.num_open[index + 1] = is_valid ? num_open : 0;
    const double log_reach = is_valid ? scratch.log_reach[node.parent] + log_step : -HUGE_VAL;
    const double score = number_or_least(log_reach + args.log_correction[index]);
    scratch.log_reach[index + 1] = log_reach;
    scratch.worst[index + 1] = scratch.worst[node.parent] < score ? scratch.worst[node.parent] : score;
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
    const int64_t draft = request * args.num_drafts + place;
    args.out_is_valid[draft] = scratch.num_open[index + 1] > 0;
    args.out_node[draft] = node.number;
    args.out_depth[draft] = node.depth;
    args.out_log_reach[draft] = scratch.log_reach[index + 1];
    const uint8_t* canvas = filled(index + 1);
    for (int32_t position = 0; position < args.block_length; ++position) {
      args.out_canvas[draft * args.block_length + position] =
          canvas[position] < kKnown ? args.token_ids[at(position) * args.num_candidates + canvas[position]]
                                    : args.canvas[at(position)];
    }
  }
};

}  // namespace dllm
