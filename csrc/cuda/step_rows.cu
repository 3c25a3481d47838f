#include "dllm/step_rows.h"

#include "launch.h"

namespace dllm::cuda {
namespace {

// A thread for each row.
__global__ void step_rows_kernel(StepRowsArgs args) {
  const auto first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t row = first; row < args.num_rows; row += static_cast<int64_t>(gridDim.x) * kThreads) {
    put_row(args, row);
  }
}

}  // namespace

const char* step_rows(const StepRowsArgs& args, Stream stream) {
  if (args.num_rows == 0) {
    return nullptr;
  }
  return launch(step_rows_kernel, Geometry{.num_ctas = dim3{num_ctas(args.num_rows)}}, stream, args);
}

}  // namespace dllm::cuda
