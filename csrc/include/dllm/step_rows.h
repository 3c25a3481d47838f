// step_rows: what each row of a forward is: its token, its position and where its K/V go.
//
// What it computes is stated in vllm_dllm/state/step_rows.py.
#pragma once

#include "dllm/macros.h"
#include "dllm/types.h"

namespace dllm {

// All arrays are contiguous but for the rows of the two tables.
struct StepRowsArgs {
  const int64_t* canvas;  // [num_reqs, num_canvases, block_length]
  const int64_t* end;     // [num_reqs, block_length], of look-aheads; nullptr: none
  const int64_t* slots;   // [num_reqs]
  const int64_t* start;   // [num_reqs], absolute position of the block

  // Of each row, [num_rows]; nullptr: the rows are those of the canvases.
  const int64_t* request;
  const int64_t* source;  // place of the token among canvases, ends and one mask; below 0: it is known
  const int64_t* position;
  const int64_t* is_stored;  // 0 or 1

  const int32_t* known;  // [num_slots, known_stride], the tokens of each sequence
  int64_t known_stride;
  const int32_t* pages;  // [num_reqs, pages_stride], the pages of each sequence; nullptr: nothing is stored
  int64_t pages_stride;
  int64_t page_size;

  int32_t* out_ids;        // [num_rows]
  int64_t* out_positions;  // [num_rows]
  int64_t* out_page;       // [num_rows], that of nobody for a row that is not stored; nullptr as pages
  int64_t* out_offset;     // [num_rows]

  int64_t num_rows;
  int64_t num_canvases;  // of all requests together
  int64_t per_request;   // canvases of each
  int64_t block_length;
  int64_t num_reqs;
  int64_t mask_token_id;
  int64_t null_page;
};

DLLM_HOST_DEVICE inline void put_row(const StepRowsArgs& args, int64_t row) {
  if (args.request == nullptr) {
    const int64_t request = row / (args.per_request * args.block_length);
    args.out_ids[row] = static_cast<int32_t>(args.canvas[row]);
    args.out_positions[row] = args.start[request] + row % args.block_length;
    return;
  }
  const int64_t request = args.request[row];
  const int64_t position = args.position[row];
  const int64_t source = args.source[row];
  const int64_t num_tokens = args.num_canvases * args.block_length;
  const int64_t num_ends = args.end == nullptr ? 0 : args.num_reqs * args.block_length;
  if (source < 0) {
    args.out_ids[row] = args.known[args.slots[request] * args.known_stride + position];
  } else if (source < num_tokens) {
    args.out_ids[row] = static_cast<int32_t>(args.canvas[source]);
  } else {
    const int64_t place = source - num_tokens;
    args.out_ids[row] = static_cast<int32_t>(place < num_ends ? args.end[place] : args.mask_token_id);
  }
  args.out_positions[row] = position;
  if (args.out_page != nullptr) {
    const int64_t page = position / args.page_size;
    args.out_page[row] = args.is_stored[row] != 0 ? args.pages[request * args.pages_stride + page] : args.null_page;
    args.out_offset[row] = position % args.page_size;
  }
}

namespace cpu {
void step_rows(const StepRowsArgs& args);
}

namespace cuda {
const char* step_rows(const StepRowsArgs& args, Stream stream);
}

}  // namespace dllm
