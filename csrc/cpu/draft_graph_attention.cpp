#include "dllm/draft_graph_attention.h"

#include <cstring>
#include <limits>

#include "isa.h"

DLLM_DECLARE(draft_graph_attention, DraftGraphAttentionArgs)

namespace dllm::cpu {
namespace {

// Rows of no node see nothing.
void write_nothing(const DraftGraphAttentionArgs& args) {
  const int64_t bytes = args.type == FloatType::kFloat32 ? 4 : 2;
  for (int64_t row = args.first_row[args.first_node[args.num_requests]]; row < args.num_rows; ++row) {
    for (int64_t head = 0; head < args.num_heads; ++head) {
      const int64_t offset = row * args.out_strides.row + head * args.out_strides.head;
      std::memset(static_cast<char*>(args.out) + offset * bytes, 0, args.head_dim * bytes);
      if (args.lse != nullptr) {
        args.lse[row * args.num_heads + head] = -std::numeric_limits<float>::infinity();
      }
    }
  }
}

void attend(const DraftGraphAttentionArgs& args) { DLLM_DISPATCH(draft_graph_attention, args); }

}  // namespace

void draft_graph_attention(const DraftGraphAttentionArgs& args) {
  attend(args);
  write_nothing(args);
}

}  // namespace dllm::cpu
