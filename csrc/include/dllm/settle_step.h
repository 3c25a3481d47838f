// settle_step: emit the blocks that a step finished, report what it did, and keep by slot what the next one starts
// from.
//
// What it computes is stated in vllm_dllm/state/settle.py. Here is what it does for one request, for a team of threads;
// settle_step.cpp and .cu bring the teams.
#pragma once

#include "dllm/credit.h"
#include "dllm/macros.h"
#include "dllm/types.h"

namespace dllm {

// In the order of Column in vllm_dllm/state/report.py; those from kProposed on count drafts by depth.
enum ReportColumn : int64_t {
  kForwards,
  kRefreshes,
  kUnmasked,
  kAccepted,
  kFinished,
  kStored,
  kWrote,
  kCommits,
  kLeft,
  kFaults,
  kProposed,
};

// All arrays are contiguous. What is written by slot overlaps with nothing that is read.
struct SettleStepArgs {
  const int64_t* canvas;  // [num_reqs, num_nodes, block_length], of the nodes; node 0 is the root
  const bool* is_valid;   // [num_reqs, num_nodes]
  const int64_t* depth;   // [num_reqs, num_nodes], in the draft graph

  // Of the trajectory; block_length positions each.
  const int64_t* after;         // [num_reqs, block_length], of the root's block
  const int64_t* next_canvas;   // [num_reqs, block_length]
  const int64_t* node;          // [num_reqs]
  const int64_t* num_steps;     // [num_reqs]
  const int64_t* num_unmasked;  // [num_reqs]
  const bool* is_finished;      // [num_reqs]
  const bool* came_over;        // [num_reqs]
  const int64_t* ids;           // [num_reqs, block_length, num_candidates]
  const double* log_probs;      // [num_reqs, block_length, num_candidates]
  const int64_t* credit_ids;    // [num_reqs, block_length, kMaxCredited]; nullptr: no policy remembers anything
  const double* credits;        // [num_reqs, block_length, kMaxCredited]

  const int64_t* slots;        // [num_reqs], no slot twice
  const int64_t* start;        // [num_reqs], absolute position of the root's block
  const int64_t* num_known;    // [num_reqs], tokens; those behind `start` are a partial block's
  const int64_t* num_counted;  // [num_reqs], tokens that vLLM counts as scheduled drafts
  const int64_t* planned;      // [3, num_reqs]: refreshes, commits, positions stored; nullptr: none

  const int64_t* end_ids;     // [num_slots, num_end_ids], -1 for none
  const int64_t* end_bounds;  // [2, num_slots]: where the first of these counts; behind what may be emitted

  int64_t* slot_canvas;      // [num_slots, block_length]
  int64_t* slot_ids;         // [num_slots, block_length, num_candidates]; nullptr: nothing is drafted
  double* slot_log_probs;    // [num_slots, block_length, num_candidates]
  bool* slot_was_masked;     // [num_slots, block_length]
  bool* slot_is_known;       // [num_slots]
  int64_t* slot_credit_ids;  // [num_slots, block_length, kMaxCredited]
  double* slot_credits;      // [num_slots, block_length, kMaxCredited]

  int32_t* out_sampled;       // [num_batch, block_length]
  int32_t* out_num_sampled;   // [num_batch]
  int32_t* out_num_rejected;  // [num_batch]
  int32_t* out_report;        // [num_batch, report_len]

  int64_t num_batch;  // at least num_reqs; what is behind has nothing to report
  int64_t num_reqs;
  int64_t num_nodes;
  int64_t block_length;
  int64_t num_candidates;
  int64_t num_slots;
  int64_t num_end_ids;
  int64_t report_len;
  int64_t mask_token_id;
};

DLLM_HOST_DEVICE inline bool root_has_masks(const SettleStepArgs& args, int64_t request) {
  const int64_t* root = args.canvas + request * args.num_nodes * args.block_length;
  for (int64_t offset = 0; offset < args.block_length; ++offset) {
    if (root[offset] == args.mask_token_id) {
      return true;
    }
  }
  return false;
}

// Drafts of a depth that were evaluated; deeper ones than the report has columns for count as the last.
DLLM_HOST_DEVICE inline int64_t count_proposed(const SettleStepArgs& args, int64_t request, int64_t depth) {
  const int64_t max_depth = args.report_len - kProposed;
  int64_t count = 0;
  for (int64_t node = 1; node < args.num_nodes; ++node) {
    const int64_t own = args.depth[request * args.num_nodes + node];
    const int64_t within = own < 1 ? 1 : own > max_depth ? max_depth : own;
    count += args.is_valid[request * args.num_nodes + node] && within == depth;
  }
  return count;
}

DLLM_HOST_DEVICE inline bool is_end_id(const SettleStepArgs& args, int64_t slot, int64_t token) {
  for (int64_t i = 0; i < args.num_end_ids; ++i) {
    if (args.end_ids[slot * args.num_end_ids + i] == token) {
      return true;
    }
  }
  return false;
}

// Whether there is an end of the answer in the block that nothing before it is masked of.
DLLM_HOST_DEVICE inline bool has_reached_end(const SettleStepArgs& args, int64_t request) {
  const int64_t slot = args.slots[request];
  const int64_t first = args.end_bounds[slot];
  const int64_t last = args.end_bounds[args.num_slots + slot] - 1;
  for (int64_t i = 0; i < args.block_length; ++i) {
    const int64_t token = args.after[request * args.block_length + i];
    const int64_t position = args.start[request] + i;
    if (token == args.mask_token_id) {
      return false;
    }
    if (position == last || (position >= first && is_end_id(args, slot, token))) {
      return true;
    }
  }
  return false;
}

DLLM_HOST_DEVICE inline bool is_emitted(const SettleStepArgs& args, int64_t request) {
  return args.is_finished[request] || (args.num_unmasked[request] > 0 && has_reached_end(args, request));
}

DLLM_HOST_DEVICE inline int64_t count_masks_after(const SettleStepArgs& args, int64_t request) {
  int64_t count = 0;
  for (int64_t i = 0; i < args.block_length; ++i) {
    count += args.after[request * args.block_length + i] == args.mask_token_id;
  }
  return count;
}

DLLM_HOST_DEVICE inline int64_t report_column(const SettleStepArgs& args, int64_t request, int64_t column,
                                              bool emitted) {
  const auto planned = [&](int64_t row) {
    return args.planned == nullptr ? 0 : args.planned[row * args.num_reqs + request];
  };
  const bool came_over = args.came_over[request];
  const int64_t over = came_over ? args.block_length : 0;
  switch (column) {
    case kForwards:
      return (root_has_masks(args, request) || came_over) && planned(0) == 0;
    case kRefreshes:
      return planned(0);
    case kUnmasked:
      return args.num_unmasked[request];
    case kAccepted:
      return args.num_steps[request] > 1 ? args.num_steps[request] - 1 : 0;
    case kFinished:
      return emitted;
    case kStored:
      return args.start[request] + over;
    case kWrote:
      return planned(2) + over;
    case kCommits:
      return planned(1);
    case kLeft:
      return emitted ? count_masks_after(args, request) : 0;
    case kFaults:
      return 0;  // for who checks the state
    default:
      return root_has_masks(args, request) ? count_proposed(args, request, column - kProposed + 1) : 0;
  }
}

// Put a request's block, or what it leaves for the next one, where its slot is.
template <typename Team>
DLLM_HOST_DEVICE inline void keep_by_slot(const SettleStepArgs& args, int64_t request, bool emitted, const Team& team) {
  const int64_t slot = args.slots[request];
  const int64_t length = args.block_length;
  const bool begins = emitted && !args.came_over[request];
  const int64_t* seen = args.canvas + (request * args.num_nodes + args.node[request]) * length;
  team.each(length, [&](int64_t i) {
    args.slot_canvas[slot * length + i] = begins ? args.mask_token_id : args.next_canvas[request * length + i];
  });
  if (args.slot_ids != nullptr) {
    team.each(length, [&](int64_t i) { args.slot_was_masked[slot * length + i] = seen[i] == args.mask_token_id; });
    team.each(1, [&](int64_t) { args.slot_is_known[slot] = !begins; });
    const int64_t size = length * args.num_candidates;
    team.each(size, [&](int64_t i) {
      args.slot_ids[slot * size + i] = args.ids[request * size + i];
      args.slot_log_probs[slot * size + i] = args.log_probs[request * size + i];
    });
  }
  if (args.credit_ids != nullptr) {
    const int64_t size = length * kMaxCredited;
    team.each(size, [&](int64_t i) {
      args.slot_credit_ids[slot * size + i] = begins ? -1 : args.credit_ids[request * size + i];
      args.slot_credits[slot * size + i] = begins ? 0.0 : args.credits[request * size + i];
    });
  }
}

// Settle the step of one request of the batch. The threads of a team share the calls of each(n, f), which is f(i) for i
// in 0..n-1; none waits for another.
template <typename Team>
DLLM_HOST_DEVICE inline void settle(const SettleStepArgs& args, int64_t request, const Team& team) {
  const int64_t length = args.block_length;
  int32_t* sampled = args.out_sampled + request * length;
  int32_t* report = args.out_report + request * args.report_len;
  if (request >= args.num_reqs) {
    team.each(length, [&](int64_t i) { sampled[i] = 0; });
    team.each(args.report_len, [&](int64_t i) { report[i] = 0; });
    team.each(1, [&](int64_t) { args.out_num_sampled[request] = args.out_num_rejected[request] = 0; });
    return;
  }
  const bool emitted = is_emitted(args, request);
  const int64_t known = args.num_known[request] - args.start[request];
  team.each(length, [&](int64_t i) {
    const int64_t column = i + known < length ? i + known : length - 1;
    sampled[i] = static_cast<int32_t>(args.after[request * length + column]);
  });
  team.each(1, [&](int64_t) {
    const int64_t num_sampled = emitted ? length - known : 0;
    args.out_num_sampled[request] = static_cast<int32_t>(num_sampled);
    args.out_num_rejected[request] = static_cast<int32_t>(args.num_counted[request] - num_sampled);
  });
  team.each(args.report_len,
            [&](int64_t i) { report[i] = static_cast<int32_t>(report_column(args, request, i, emitted)); });
  keep_by_slot(args, request, emitted, team);
}

namespace cpu {
void settle_step(const SettleStepArgs& args);
}

namespace cuda {
const char* settle_step(const SettleStepArgs& args, Stream stream);
}

}  // namespace dllm
