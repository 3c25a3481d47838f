#include "dllm/step_rows.h"

namespace dllm::cpu {

void step_rows(const StepRowsArgs& args) {
  for (int64_t row = 0; row < args.num_rows; ++row) {
    put_row(args, row);
  }
}

}  // namespace dllm::cpu
