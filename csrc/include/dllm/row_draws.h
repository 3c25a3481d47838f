// row_draws: how the token of each evaluated row is drawn.
//
// What it computes is stated in vllm_dllm/state/draws.py.
#pragma once

#include "dllm/macros.h"
#include "dllm/splitmix.h"
#include "dllm/types.h"

namespace dllm {

// All arrays are contiguous.
struct RowDrawsArgs {
  const int64_t* slots;   // [num_reqs]
  const int64_t* start;   // [num_reqs], absolute position of the block
  const bool* is_masked;  // [num_reqs, num_canvases, block_length]
  const int64_t* place;   // [num_evaluated], of each evaluated canvas among all; nullptr: all are

  const int64_t* seed;        // [num_slots]
  const int64_t* top_k;       // [num_slots]
  const double* temperature;  // [num_slots]
  const double* top_p;        // [num_slots]

  double* out_temperature;  // [num_evaluated * block_length], as the next
  int64_t* out_top_k;
  double* out_top_p;
  int64_t* out_keys;

  int64_t num_rows;
  int64_t num_canvases;  // of each request
  int64_t block_length;
  bool looks_ahead;  // whether the last canvas is of the next block
};

DLLM_HOST_DEVICE inline void put_draw(const RowDrawsArgs& args, int64_t row) {
  const int64_t evaluated = row / args.block_length;
  const int64_t canvas = args.place == nullptr ? evaluated : args.place[evaluated];
  const int64_t request = canvas / args.num_canvases;
  const bool is_next = args.looks_ahead && canvas % args.num_canvases == args.num_canvases - 1;
  int64_t num_masked = 0;
  for (int64_t offset = 0; offset < args.block_length; ++offset) {
    num_masked += args.is_masked[canvas * args.block_length + offset];
  }
  const int64_t slot = args.slots[request];
  const int64_t start = args.start[request] + (is_next ? args.block_length : 0);
  args.out_temperature[row] = args.temperature[slot];
  args.out_top_k[row] = args.top_k[slot];
  args.out_top_p[row] = args.top_p[slot];
  args.out_keys[row] = static_cast<int64_t>(stream_key(args.seed[slot], start + row % args.block_length, num_masked));
}

namespace cpu {
void row_draws(const RowDrawsArgs& args);
}

namespace cuda {
const char* row_draws(const RowDrawsArgs& args, Stream stream);
}

}  // namespace dllm
