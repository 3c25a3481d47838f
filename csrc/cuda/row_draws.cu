#include "dllm/row_draws.h"

#include "launch.h"

namespace dllm::cuda {
namespace {

// A thread for each row.
__global__ void row_draws_kernel(RowDrawsArgs args) {
  const auto first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t row = first; row < args.num_rows; row += static_cast<int64_t>(gridDim.x) * kThreads) {
    put_draw(args, row);
  }
}

}  // namespace

const char* row_draws(const RowDrawsArgs& args, Stream stream) {
  if (args.num_rows == 0) {
    return nullptr;
  }
  return launch(row_draws_kernel, Geometry{.num_ctas = dim3{num_ctas(args.num_rows)}}, stream, args);
}

}  // namespace dllm::cuda
