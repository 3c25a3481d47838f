#include "dllm/propose_nodes.h"

#include "dllm/proposal.h"
#include "launch.h"

namespace dllm::cuda {
namespace {

constexpr int kProposeThreads = 128;  // a thread draws a position or fills a node; both are few

__device__ void draw(const Proposal& proposal, int64_t num_unmasked) {
  const ProposeScratch& scratch = proposal.scratch;
  const uint8_t* root = proposal.filled(0);
  const int32_t block_length = proposal.args.block_length;
  for (int32_t position = threadIdx.x; position < block_length; position += kProposeThreads) {
    if (root[position] == kOpen) {
      proposal.draw_position(position, scratch.num_open[0] - num_unmasked);
    }
  }
  __syncthreads();
  for (int32_t position = threadIdx.x; position < block_length; position += kProposeThreads) {
    int32_t rank = 0;
    for (int32_t other = 0; other < block_length; ++other) {
      rank += root[other] == kOpen && proposal.is_before(other, position);
    }
    if (root[position] == kOpen) {
      scratch.ranked[rank] = position;
    }
  }
  __syncthreads();
}

// One CTA per request.
__global__ void propose_nodes_kernel(ProposeNodesArgs args) {
  DLLM_DYNAMIC_SHARED(memory);
  const ProposeScratch scratch = make_scratch(args, memory);
  const Proposal proposal{args, scratch, blockIdx.x};
  const int32_t thread = static_cast<int32_t>(threadIdx.x);
  for (int32_t position = thread; position < args.block_length; position += kProposeThreads) {
    proposal.begin_position(position);
  }
  __syncthreads();
  if (thread == 0) {
    int32_t num_open = 0;
    for (int32_t position = 0; position < args.block_length; ++position) {
      num_open += proposal.filled(0)[position] == kOpen;
    }
    scratch.num_open[0] = num_open;
    scratch.log_reach[0] = 0.0;
    scratch.worst[0] = HUGE_VAL;
  }
  __syncthreads();
  for (int32_t begin = 0, end = 0; begin < args.num_nodes; begin = end) {
    const int32_t num_unmasked = args.nodes[begin].num_unmasked;
    while (end < args.num_nodes && args.nodes[end].num_unmasked == num_unmasked) {
      ++end;
    }
    if (begin == 0 || proposal.is_noisy()) {
      draw(proposal, num_unmasked);
    }
    for (int32_t index = begin + thread; index < end; index += kProposeThreads) {
      const int32_t parent = args.nodes[index].parent;
      const bool needs_log_z = !proposal.is_random() && scratch.num_open[parent] > 0;
      proposal.fill_node(index, needs_log_z ? proposal.log_choices(parent) : 0.0);
    }
    __syncthreads();
  }
  for (int32_t index = thread; index < args.num_nodes; index += kProposeThreads) {
    proposal.put_draft(index);
  }
}

}  // namespace

const char* propose_nodes(const ProposeNodesArgs& args, Stream stream) {
  if (args.num_reqs == 0) {
    return nullptr;
  }
  const Geometry geometry = {.num_ctas = dim3{static_cast<unsigned>(args.num_reqs)},
                             .num_threads = kProposeThreads,
                             .shared_bytes = scratch_bytes(args)};
  return launch(propose_nodes_kernel, geometry, stream, args);
}

}  // namespace dllm::cuda
