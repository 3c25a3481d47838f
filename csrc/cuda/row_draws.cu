#include "dllm/row_draws.h"

#include "launch.h"

namespace dllm::cuda {
namespace {

struct PutDraw {
  __device__ void operator()(const RowDrawsArgs& args, int64_t row) const { put_draw(args, row); }
};

}  // namespace

const char* row_draws(const RowDrawsArgs& args, Stream stream) { return launch_rows<PutDraw>(args, stream); }

}  // namespace dllm::cuda
