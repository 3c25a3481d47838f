#include "dllm/row_draws.h"

namespace dllm::cpu {

void row_draws(const RowDrawsArgs& args) {
  for (int64_t row = 0; row < args.num_rows; ++row) {
    put_draw(args, row);
  }
}

}  // namespace dllm::cpu
