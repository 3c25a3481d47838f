#include "dllm/settle_step.h"

namespace dllm::cpu {
namespace {

// One thread.
struct Team {
  template <typename Each>
  void each(int64_t count, Each call) const {
    for (int64_t i = 0; i < count; ++i) {
      call(i);
    }
  }
};

}  // namespace

void settle_step(const SettleStepArgs& args) {
  for (int64_t request = 0; request < args.num_batch; ++request) {
    settle(args, request, Team{});
  }
}

}  // namespace dllm::cpu
