#include "dllm/decide_walk.h"

#include "launch.h"

namespace dllm::cuda {
namespace {

constexpr int kWalkThreads = 128;  // a thread decides a position, a warp compares a node; both are few

// The threads of a CTA.
struct Team {
  int* flag;  // in shared memory

  template <typename Each>
  __device__ void each(int64_t count, Each call) const {
    for (int64_t i = threadIdx.x; i < count; i += kWalkThreads) {
      call(i);
    }
    __syncthreads();
  }

  template <typename Once>
  __device__ void once(Once call) const {
    if (threadIdx.x == 0) {
      call();
    }
    __syncthreads();
  }

  template <typename Predicate>
  __device__ bool any(int64_t count, Predicate holds) const {
    once([&] { *flag = 0; });
    each(count, [&](int64_t i) {
      if (holds(i)) {
        atomicMax(flag, 1);
      }
    });
    return result() != 0;
  }

  template <typename Predicate>
  __device__ int64_t find(int64_t num_nodes, int64_t count, Predicate holds) const {
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    once([&] { *flag = 0; });
    for (int64_t node = 1 + warp; node < num_nodes; node += kWalkThreads / kWarp) {
      bool is_it = true;
      for (int64_t i = lane; i < count; i += kWarp) {
        is_it = is_it && holds(node, i);
      }
      if (__all_sync(kAllLanes, is_it) && lane == 0) {
        atomicMax(flag, static_cast<int>(num_nodes - node));
      }
    }
    __syncthreads();
    return num_nodes - result();  // without any flag is 0
  }

  // Read the flag before anybody changes it again.
  __device__ int result() const {
    const int value = *flag;
    __syncthreads();
    return value;
  }
};

// One CTA per request.
__global__ void decide_walk_kernel(DecideWalkArgs args) {
  DLLM_SHARED(int, flag);
  DLLM_DYNAMIC_SHARED(memory);
  walk(args, make_walk_scratch(args.block_length, memory), blockIdx.x, Team{&flag});
}

}  // namespace

const char* decide_walk(const DecideWalkArgs& args, Stream stream) {
  if (args.num_reqs == 0) {
    return nullptr;
  }
  const Geometry geometry = {.num_ctas = dim3{static_cast<unsigned>(args.num_reqs)},
                             .num_threads = kWalkThreads,
                             .shared_bytes = walk_scratch_bytes(args.block_length)};
  return launch(decide_walk_kernel, geometry, stream, args);
}

}  // namespace dllm::cuda
