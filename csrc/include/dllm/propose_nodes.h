// propose_nodes: the canvases of a step. Of each request its own, read by slot, and the nodes of a draft graph, filled,
// that are likeliest reached.
//
// What it computes is stated in vllm_dllm/draft/native.py, propose.py and prune.py; how, for one request, in
// proposal.h.
#pragma once

#include "dllm/token_weights.h"
#include "dllm/types.h"

namespace dllm {

// One node of the graph besides the root. Nodes lie by (num_unmasked, parent, number), so parents precede.
struct GraphNode {
  int32_t number;        // in the graph, from 1
  int32_t parent;        // the first parent: 0 is the root, i + 1 the node that lies at i
  int32_t num_unmasked;  // positions that the parent adds to the root
  int32_t depth;
  int32_t end_pair;  // the node adds pairs [end_pair of the one before, end_pair) to its parent
};

struct GraphPair {
  int32_t position_rank;  // among the positions that are masked in the parent
  int32_t vocab_rank;
};

// draft/readiness.py
struct Readiness {
  double slope;
  double near[2];
  double bias;
};

// How far apart positions are of which a ranker says what one adds to another.
constexpr int32_t kReach = 4;

// All arrays are contiguous.
struct ProposeNodesArgs {
  const GraphNode* nodes;        // [num_nodes]
  const GraphPair* pairs;        // [num_pairs]
  const double* log_correction;  // [num_nodes], of nodes as they lie
  Readiness readiness;
  TokenWeights token_weights;  // read if has_token_weights
  bool has_token_weights;      // which choose the tokens of requests of temperature 0
  bool is_one_by_one;          // every step unmasks one position

  const int64_t* slots;  // [num_reqs]
  const int64_t* start;  // [num_reqs], absolute position of the block
  const double* terms;   // [num_reqs, block_length, 1 + 2 * kReach], what a ranker adds to readiness; nullptr: nothing

  // By slot: the canvas, and of the step that made it the candidates and what was masked before it.
  const int64_t* canvas;     // [num_slots, block_length]
  const int64_t* token_ids;  // [num_slots, block_length, num_candidates], most probable first
  const double* log_probs;   // [num_slots, block_length, num_candidates]
  const bool* was_masked;    // [num_slots, block_length]
  const bool* is_known;      // [num_slots], whether there was such a step
  const int64_t* seq_len;    // [num_slots], where the sequence ends

  const int64_t* policy;      // [num_slots], of Policy; nullptr: no request has noise, and the four below are not read
  const int64_t* seed;        // [num_slots]
  const int64_t* top_k;       // [num_slots], 0 keeps all
  const double* temperature;  // [num_slots]
  const double* top_p;        // [num_slots]

  int64_t* out_canvas;    // [num_reqs, num_canvases, block_length], the root first
  bool* out_is_masked;    // [num_reqs, num_canvases, block_length]
  bool* out_is_valid;     // [num_reqs, num_canvases]
  int64_t* out_depth;     // [num_reqs, num_canvases]
  int64_t* out_node;      // [num_reqs, num_drafts]
  double* out_log_reach;  // [num_reqs, num_drafts]
  int64_t* out_end;  // [num_reqs, block_length], of the look-ahead, whose next root is the last canvas; nullptr: none

  int64_t num_reqs;
  int64_t mask_token_id;
  int64_t sub_block_length;  // of parts of a block that are unmasked one after another; 0: it has none
  int32_t num_canvases;      // 1 + num_drafts, and one with a look-ahead
  int32_t block_length;
  int32_t num_nodes;
  int32_t num_drafts;
  int32_t num_candidates;   // 1..kMaxCandidates
  int32_t num_vocab_ranks;  // 1 + the largest vocab rank, at most num_candidates
};

namespace cpu {
void propose_nodes(const ProposeNodesArgs& args);
}

namespace cuda {
const char* propose_nodes(const ProposeNodesArgs& args, Stream stream);
}

}  // namespace dllm
