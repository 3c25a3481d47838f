#include "dllm/propose_nodes.h"

#include <algorithm>
#include <array>
#include <vector>

#include "dllm/proposal.h"

namespace dllm::cpu {
namespace {

void draw(const Proposal& proposal, int64_t num_unmasked) {
  const ProposeScratch& scratch = proposal.scratch;
  const int32_t num_masked = scratch.num_open[0];
  int32_t count = 0;
  for (int32_t position = 0; position < proposal.args.block_length; ++position) {
    if (proposal.filled(0)[position] == kOpen) {
      proposal.draw_position(position, num_masked - num_unmasked);
      scratch.ranked[count++] = position;
    }
  }
  std::sort(scratch.ranked, scratch.ranked + num_masked,
            [&](int32_t a, int32_t b) { return proposal.is_before(a, b); });
}

double log_choices(const Proposal& proposal, int32_t node) {
  const uint8_t* canvas = proposal.filled(node);
  double largest = -HUGE_VAL;
  for (int32_t lane = 0; lane < kSumLanes; ++lane) {
    largest = std::max(largest, proposal.largest_ready(canvas, lane));
  }
  std::array<double, kSumLanes> sums;
  for (int32_t lane = 0; lane < kSumLanes; ++lane) {
    sums[lane] = proposal.sum_choices(canvas, lane, largest);
  }
  for (int32_t half = kSumLanes / 2; half > 0; half /= 2) {
    for (int32_t lane = 0; lane < half; ++lane) {
      sums[lane] += sums[lane + half];
    }
  }
  return proposal.log_choices(sums[0], largest);
}

void propose(const Proposal& proposal) {
  const ProposeNodesArgs& args = proposal.args;
  const ProposeScratch& scratch = proposal.scratch;
  for (int32_t position = 0; position < args.block_length; ++position) {
    proposal.begin_position(position);
  }
  scratch.num_open[0] = static_cast<int32_t>(std::count(proposal.filled(0), proposal.filled(1), kOpen));
  if (args.num_canvases == 1) {
    return;
  }
  scratch.log_reach[0] = 0.0;
  scratch.worst[0] = HUGE_VAL;
  double log_z = 0.0;
  for (int32_t index = 0; index < args.num_nodes; ++index) {
    const GraphNode& node = args.nodes[index];
    const GraphNode* before = index == 0 ? nullptr : &args.nodes[index - 1];
    if (before == nullptr || (proposal.is_noisy() && node.num_unmasked != before->num_unmasked)) {
      draw(proposal, node.num_unmasked);
    }
    const bool needs_log_z = !proposal.is_random() && scratch.num_open[node.parent] > 0;
    if (needs_log_z && (before == nullptr || node.parent != before->parent)) {
      log_z = log_choices(proposal, node.parent);
    }
    proposal.fill_node(index, log_z);
  }
  for (int32_t index = 0; index < args.num_nodes; ++index) {
    proposal.put_draft(index);
  }
  for (int32_t position = 0; args.out_end != nullptr && position < args.block_length; ++position) {
    proposal.rank_end(position);
  }
  for (int32_t position = 0; args.out_end != nullptr && position < args.block_length; ++position) {
    proposal.put_end(position);
  }
}

}  // namespace

void propose_nodes(const ProposeNodesArgs& args) {
#pragma omp parallel
  {
    std::vector<double> memory(scratch_bytes(args) / sizeof(double) + 1);
    const ProposeScratch scratch = make_scratch(args, memory.data());
#pragma omp for schedule(static)
    for (int64_t request = 0; request < args.num_reqs; ++request) {
      propose(Proposal{args, scratch, request});
    }
  }
}

}  // namespace dllm::cpu
