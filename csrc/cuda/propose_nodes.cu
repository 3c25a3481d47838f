#include "dllm/propose_nodes.h"

#include "dllm/proposal.h"
#include "launch.h"

namespace dllm::cuda {
namespace {

// A thread draws a position or fills a node, a warp sums the choices of one; all are few.
constexpr int kProposeThreads = 128;
static_assert(kSumLanes == kWarp, "a warp adds in the order of Proposal's lanes");

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

// The calling warp's; all of its lanes return it.
__device__ double log_choices(const Proposal& proposal, int32_t node) {
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % kWarp;
  const uint8_t* canvas = proposal.filled(node);
  double largest = proposal.largest_ready(canvas, lane);
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const double other = __shfl_xor_sync(kAllLanes, largest, offset);
    largest = other > largest ? other : largest;
  }
  double sum = proposal.sum_choices(canvas, lane, largest);
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    sum += __shfl_xor_sync(kAllLanes, sum, offset);
  }
  return proposal.log_choices(sum, largest);
}

// The choices of the parents of nodes [begin, end), of which siblings lie together.
__device__ void sum_parents(const Proposal& proposal, int32_t begin, int32_t end) {
  const GraphNode* nodes = proposal.args.nodes;
  const int32_t warp = static_cast<int32_t>(threadIdx.x) / kWarp;
  int32_t number = 0;
  for (int32_t index = begin; index < end; ++index) {
    const int32_t parent = nodes[index].parent;
    const bool is_first = index == begin || nodes[index - 1].parent != parent;
    if (!is_first || proposal.scratch.num_open[parent] == 0 || number++ % (kProposeThreads / kWarp) != warp) {
      continue;
    }
    const double log_z = log_choices(proposal, parent);
    if (threadIdx.x % kWarp == 0) {
      proposal.scratch.log_z[parent] = log_z;
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
  if (args.num_canvases == 1) {
    return;
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
    if (!proposal.is_random()) {
      sum_parents(proposal, begin, end);
    }
    for (int32_t index = begin + thread; index < end; index += kProposeThreads) {
      proposal.fill_node(index, scratch.log_z[args.nodes[index].parent]);
    }
    __syncthreads();
  }
  for (int32_t index = thread; index < args.num_nodes; index += kProposeThreads) {
    proposal.put_draft(index);
  }
  if (args.out_end == nullptr) {
    return;
  }
  for (int32_t position = thread; position < args.block_length; position += kProposeThreads) {
    proposal.rank_end(position);
  }
  __syncthreads();
  for (int32_t position = thread; position < args.block_length; position += kProposeThreads) {
    proposal.put_end(position);
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
