#include "dllm/settle_step.h"

#include "launch.h"

namespace dllm::cuda {
namespace {

constexpr int kSettleThreads = 128;

// The threads of a CTA.
struct Team {
  template <typename Each>
  __device__ void each(int64_t count, Each call) const {
    for (int64_t i = threadIdx.x; i < count; i += kSettleThreads) {
      call(i);
    }
  }
};

// One CTA per request.
__global__ void settle_step_kernel(SettleStepArgs args) { settle(args, blockIdx.x, Team{}); }

}  // namespace

const char* settle_step(const SettleStepArgs& args, Stream stream) {
  if (args.num_batch == 0) {
    return nullptr;
  }
  const Geometry geometry = {.num_ctas = dim3{static_cast<unsigned>(args.num_batch)}, .num_threads = kSettleThreads};
  return launch(settle_step_kernel, geometry, stream, args);
}

}  // namespace dllm::cuda
