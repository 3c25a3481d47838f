#include "dllm/verify_walk.h"
#include "launch.h"

namespace dllm::cuda {
namespace {

// Whether all threads of a warp find the two canvases equal.
__device__ bool is_equal(const int64_t* a, const int64_t* b, int64_t block_length) {
  bool same = true;
  for (int64_t position = threadIdx.x % kWarp; position < block_length; position += kWarp) {
    same = same && a[position] == b[position];
  }
  return __all_sync(kAllLanes, same);
}

// One CTA per request, one warp per node that may follow.
__global__ void verify_walk_kernel(VerifyWalkArgs args) {
  DLLM_SHARED(int, found);  // num_nodes less the first node that follows, 0 where there is none
  const int64_t request = blockIdx.x;
  const int64_t first = request * args.num_nodes;
  const int num_nodes = static_cast<int>(args.num_nodes);
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int num_warps = static_cast<int>(blockDim.x) / kWarp;
  walk(args, request, [&](int64_t node) {
    __syncthreads();  // all have read what the step before found
    if (threadIdx.x == 0) {
      found = 0;
    }
    __syncthreads();
    const int64_t* wanted = args.next_canvas + (first + node) * args.block_length;
    for (int other = 1 + warp; other < num_nodes; other += num_warps) {
      const int64_t* canvas = args.canvas + (first + other) * args.block_length;
      if (args.is_valid[first + other] && is_equal(canvas, wanted, args.block_length) && threadIdx.x % kWarp == 0) {
        atomicMax(&found, num_nodes - other);
      }
    }
    __syncthreads();
    return static_cast<int64_t>(found == 0 ? 0 : num_nodes - found);
  });
}

}  // namespace

const char* verify_walk(const VerifyWalkArgs& args, Stream stream) {
  if (args.num_reqs == 0) {
    return nullptr;
  }
  return launch(verify_walk_kernel, {.num_ctas = dim3{static_cast<unsigned>(args.num_reqs)}}, stream, args);
}

}  // namespace dllm::cuda
