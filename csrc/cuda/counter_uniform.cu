#include "dllm/counter_uniform.h"
#include "dllm/splitmix.h"
#include "launch.h"

namespace dllm::cuda {
namespace {

__global__ void counter_uniform_kernel(CounterUniformArgs args) {
  const int64_t num_items = args.num_rows * args.num_ids;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; item < num_items; item += step) {
    const int64_t row = item / args.num_ids;
    const auto key = static_cast<uint64_t>(args.keys[row * args.key_stride]);
    args.out[item] = uniform(key, args.first_id + item % args.num_ids);
  }
}

}  // namespace

const char* counter_uniform(const CounterUniformArgs& args, Stream stream) {
  const int64_t num_items = args.num_rows * args.num_ids;
  if (num_items == 0) {
    return nullptr;
  }
  return launch(counter_uniform_kernel, {.num_ctas = dim3{num_ctas(num_items)}}, stream, args);
}

}  // namespace dllm::cuda
