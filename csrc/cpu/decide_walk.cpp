#include "dllm/decide_walk.h"

#include <vector>

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

  template <typename Once>
  void once(Once call) const {
    call();
  }

  template <typename Predicate>
  bool any(int64_t count, Predicate holds) const {
    for (int64_t i = 0; i < count; ++i) {
      if (holds(i)) {
        return true;
      }
    }
    return false;
  }

  template <typename Predicate>
  int64_t find(int64_t num_nodes, int64_t count, Predicate holds) const {
    int64_t node = 1;
    while (node < num_nodes && any(count, [&](int64_t i) { return !holds(node, i); })) {
      ++node;
    }
    return node < num_nodes ? node : num_nodes;
  }
};

}  // namespace

void decide_walk(const DecideWalkArgs& args) {
#pragma omp parallel if (args.num_reqs > 1)
  {
    std::vector<double> memory(walk_scratch_bytes(args.block_length) / sizeof(double) + 1);
    const WalkScratch scratch = make_walk_scratch(args.block_length, memory.data());
#pragma omp for schedule(static)
    for (int64_t request = 0; request < args.num_reqs; ++request) {
      walk(args, scratch, request, Team{});
    }
  }
}

}  // namespace dllm::cpu
