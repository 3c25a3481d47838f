#include "dllm/verify_walk.h"

#include <cstring>

namespace dllm::cpu {

void verify_walk(const VerifyWalkArgs& args) {
  const size_t canvas_bytes = sizeof(int64_t) * static_cast<size_t>(args.block_length);
#pragma omp parallel for schedule(static)
  for (int64_t request = 0; request < args.num_reqs; ++request) {
    const int64_t first = request * args.num_nodes;
    walk(args, request, [&](int64_t node) {
      const int64_t* wanted = args.next_canvas + (first + node) * args.block_length;
      for (int64_t other = 1; other < args.num_nodes; ++other) {
        const int64_t* canvas = args.canvas + (first + other) * args.block_length;
        if (args.is_valid[first + other] && std::memcmp(canvas, wanted, canvas_bytes) == 0) {
          return other;
        }
      }
      return int64_t{0};
    });
  }
}

}  // namespace dllm::cpu
