#include <algorithm>

#include "clones.h"
#include "dllm/counter_uniform.h"
#include "dllm/splitmix.h"

namespace dllm::cpu {
namespace {

constexpr int64_t kTile = 4096;  // ids of one row that a thread takes at a time

DLLM_CLONES void fill(double* out, uint64_t key, int64_t first_id, int64_t num_ids) {
#pragma omp simd
  for (int64_t i = 0; i < num_ids; ++i) {
    out[i] = uniform(key, first_id + i);
  }
}

}  // namespace

void counter_uniform(const CounterUniformArgs& args) {
  // Tiles of rows: few rows of a whole vocabulary and many rows of few ids use all threads alike.
#pragma omp parallel for collapse(2) schedule(static)
  for (int64_t row = 0; row < args.num_rows; ++row) {
    for (int64_t begin = 0; begin < args.num_ids; begin += kTile) {
      const auto key = static_cast<uint64_t>(args.keys[row * args.key_stride]);
      const int64_t num_ids = std::min(kTile, args.num_ids - begin);
      fill(args.out + row * args.num_ids + begin, key, args.first_id + begin, num_ids);
    }
  }
}

}  // namespace dllm::cpu
