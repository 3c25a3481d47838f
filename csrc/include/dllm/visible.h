// Who sees whom (docs/attention.md): the one statement of visibility, for host and device.
//
// A row of a node sees the stored positions in the node's context, which is two intervals, and rows of its own node:
// all of them, or, in a causal node, itself and those before it. It sees nothing else: no other node, no other request.
// A denoising canvas, its drafts, a refresh, the commit of a finished block and a block-causal prefill differ in their
// intervals alone.
#pragma once

#include "dllm/macros.h"
#include "dllm/types.h"

namespace dllm {

// Positions [begin, end); empty where end <= begin.
struct Interval {
  int32_t begin;
  int32_t end;
};

constexpr int kContextIntervals = 2;

// Stored positions that a node sees: disjoint intervals in ascending order, as four int32 lie in memory.
struct Context {
  Interval interval[kContextIntervals];
};

DLLM_HOST_DEVICE inline Interval intersect(Interval a, Interval b) {
  return {a.begin > b.begin ? a.begin : b.begin, a.end < b.end ? a.end : b.end};
}

DLLM_HOST_DEVICE inline bool is_empty(Interval interval) { return interval.end <= interval.begin; }

DLLM_HOST_DEVICE inline bool is_same(const Context& a, const Context& b) {
  return a.interval[0].begin == b.interval[0].begin && a.interval[0].end == b.interval[0].end &&
         a.interval[1].begin == b.interval[1].begin && a.interval[1].end == b.interval[1].end;
}

DLLM_HOST_DEVICE inline bool contains(Interval interval, int32_t position) {
  return interval.begin <= position && position < interval.end;
}

// Of a node's rows those that one of them sees.
DLLM_HOST_DEVICE inline Interval seen_rows(Interval rows, bool is_causal, int32_t row) {
  return {rows.begin, is_causal && row < rows.end ? row + 1 : rows.end};
}

DLLM_HOST_DEVICE inline bool sees_stored(const Context& context, int32_t position) {
  return contains(context.interval[0], position) || contains(context.interval[1], position);
}

}  // namespace dllm
