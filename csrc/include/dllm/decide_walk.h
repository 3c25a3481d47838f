// decide_walk: from the root on, decide the next canvas, go to the node that has it, and repeat.
//
// What it computes is stated in vllm_dllm/unmask/walk.py. Here is the walk of one request, for a team of threads;
// decide_walk.cpp and .cu bring the teams.
#pragma once

#include <cmath>
#include <cstddef>

#include "dllm/macros.h"
#include "dllm/types.h"
#include "dllm/walk_policies.h"

namespace dllm {

// What a team shares while it walks for a request.
struct WalkScratch {
  double* score;        // [block_length], of open positions
  double* ordered;      // [block_length], the scores in descending order
  int64_t* canvas;      // [block_length], the next canvas of the node at hand
  int64_t* token;       // [block_length], what open positions would take
  int32_t* rank;        // [block_length], of open positions
  int32_t* num_masked;  // of the node at hand
  int32_t* num_open;    // those of them that it may unmask
  int32_t* count;       // how many of them it unmasks
};

inline size_t walk_scratch_bytes(int64_t block_length) {
  return static_cast<size_t>(block_length) * (4 * sizeof(double) + sizeof(int32_t)) + 3 * sizeof(int32_t);
}

// Lay the scratch out in memory aligned for double.
DLLM_HOST_DEVICE inline WalkScratch make_walk_scratch(int64_t block_length, void* memory) {
  WalkScratch scratch = {};
  scratch.score = static_cast<double*>(memory);
  scratch.ordered = scratch.score + block_length;
  scratch.canvas = reinterpret_cast<int64_t*>(scratch.ordered + block_length);
  scratch.token = scratch.canvas + block_length;
  scratch.rank = reinterpret_cast<int32_t*>(scratch.token + block_length);
  scratch.num_masked = scratch.rank + block_length;
  scratch.num_open = scratch.num_masked + 1;
  scratch.count = scratch.num_open + 1;
  return scratch;
}

// Put the next canvas of a node into the scratch.
template <typename Team>
DLLM_HOST_DEVICE inline void decide(const DecideWalkArgs& args, const WalkScratch& scratch, const WalkNode& at,
                                    const Team& team) {
  const int64_t* canvas = args.canvas + (at.request * args.num_nodes + at.node) * args.block_length;
  const int64_t first = first_row(args, at);
  const int64_t end = stage_end(args, canvas);
  const auto is_open = [&](int64_t offset) { return offset < end && canvas[offset] == args.mask_token_id; };
  team.once([&] {
    *scratch.num_masked = *scratch.num_open = 0;
    for (int64_t offset = 0; offset < args.block_length; ++offset) {
      *scratch.num_masked += canvas[offset] == args.mask_token_id;
      *scratch.num_open += is_open(offset);
    }
  });
  const int64_t num_masked = *scratch.num_masked;
  const int64_t num_open = *scratch.num_open;
  const bool has_credit = remembers_credit(args, at.request);
  team.each(args.block_length, [&](int64_t offset) {
    if (!is_open(offset)) {
      return;
    }
    if (has_credit) {
      const CreditedToken drawn = draw_credited(args, at, offset, num_masked);
      scratch.token[offset] = drawn.id;
      scratch.score[offset] = drawn.confidence;
    } else {
      scratch.token[offset] = args.token_ids[first + offset];
      scratch.score[offset] = position_score(args, at, offset, num_masked);
    }
  });
  team.each(args.block_length, [&](int64_t offset) {
    if (is_open(offset)) {
      int32_t rank = 0;
      for (int64_t other = 0; other < end; ++other) {
        rank += is_open(other) && is_scored_before(scratch.score, other, offset);
      }
      scratch.rank[offset] = rank;
      scratch.ordered[rank] = scratch.score[offset];
    }
  });
  team.once(
      [&] { *scratch.count = static_cast<int32_t>(policy_count(args, at, scratch.ordered, num_masked, num_open)); });
  team.each(args.block_length, [&](int64_t offset) {
    const bool is_chosen = is_open(offset) && scratch.rank[offset] < *scratch.count;
    scratch.canvas[offset] = is_chosen ? scratch.token[offset] : canvas[offset];
  });
}

// Write the candidates of a node's rows.
template <typename Team>
DLLM_HOST_DEVICE inline void put_candidates(const DecideWalkArgs& args, const WalkNode& at, const Team& team) {
  team.each(args.block_length, [&](int64_t offset) {
    const int64_t row = first_row(args, at) + offset;
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

// Remember what the arrays say of the request's block; nothing where they are nullptr.
template <typename Team>
DLLM_HOST_DEVICE inline void remember(const DecideWalkArgs& args, int64_t request, const int64_t* ids,
                                      const double* credits, const Team& team) {
  if (args.credit_ids == nullptr) {
    return;
  }
  const int64_t first = request * args.block_length * kMaxCredited;
  team.each(args.block_length * kMaxCredited, [&](int64_t i) {
    args.out_credit_ids[first + i] = ids == nullptr ? -1 : ids[first + i];
    args.out_credits[first + i] = credits == nullptr ? 0.0 : credits[first + i];
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
  remember(args, request, args.credit_ids, args.credits, team);
  const bool has_credit = remembers_credit(args, request);
  const auto is_decidable = [&](int64_t node) {
    const int64_t stage = stage_end(args, scratch.canvas);
    return !has_credit || !team.any(stage, [&](int64_t offset) {
      return scratch.canvas[offset] == args.mask_token_id && !knows_credited(args, {request, node, at.start}, offset);
    });
  };
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
    goes_on = !is_finished && found < num_in_block && num_steps < num_in_block && is_decidable(found);
    at.node = goes_on ? found : at.node;
  }
  const bool came_over =
      args.end != nullptr && is_finished && is_valid[num_nodes - 1] &&
      !team.any(length, [&](int64_t offset) { return args.end[request * length + offset] != scratch.canvas[offset]; });
  team.each(length, [&](int64_t offset) { args.out_canvas[request * length + offset] = scratch.canvas[offset]; });
  if (came_over) {
    at = {request, num_nodes - 1, at.start + length};
    remember(args, request, nullptr, nullptr, team);
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
