// verify_walk: how far the drafts of each request came true in one forward.
#pragma once

#include "dllm/macros.h"
#include "dllm/types.h"

namespace dllm {

// From the root (node 0) each step goes to the first valid node but the root whose canvas is the next canvas of the
// node at hand; the walk ends where there is none, or after num_nodes - 1 steps, as no node can follow twice.
struct VerifyWalkArgs {
  const int64_t* canvas;       // [num_reqs, num_nodes, block_length], contiguous
  const int64_t* next_canvas;  // [num_reqs, num_nodes, block_length], contiguous
  const bool* is_valid;        // [num_reqs, num_nodes], contiguous
  int64_t* node;               // [num_reqs], the last node of the walk
  int64_t* num_accepted;       // [num_reqs], its steps
  int64_t num_reqs;
  int64_t num_nodes;
  int64_t block_length;
};

// The walk of one request. `successor(node)` is the first node that is `node`'s next canvas, 0 where there is none.
template <typename Successor>
DLLM_HOST_DEVICE inline void walk(const VerifyWalkArgs& args, int64_t request, Successor successor) {
  int64_t node = 0;
  int64_t num_accepted = 0;
  for (int64_t next = 0; num_accepted + 1 < args.num_nodes && (next = successor(node)) != 0; ++num_accepted) {
    node = next;
  }
  args.node[request] = node;
  args.num_accepted[request] = num_accepted;
}

namespace cpu {
void verify_walk(const VerifyWalkArgs& args);
}

namespace cuda {
const char* verify_walk(const VerifyWalkArgs& args, Stream stream);
}

}  // namespace dllm
