#include "dllm/step_rows.h"

#include "launch.h"

namespace dllm::cuda {
namespace {

struct PutRow {
  __device__ void operator()(const StepRowsArgs& args, int64_t row) const { put_row(args, row); }
};

}  // namespace

const char* step_rows(const StepRowsArgs& args, Stream stream) { return launch_rows<PutRow>(args, stream); }

}  // namespace dllm::cuda
