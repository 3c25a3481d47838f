// Online softmax in base 2: what is known of sum_j 2^x_j after some of the exponents x_j = score_j * scale * log2(e).
//
// A row's scores come in tiles. Sums are kept relative to the largest exponent so far, so that nothing overflows:
//
//   factor = exp2(raise_max(state, tile_max));
//   p_j = exp2(x_j - softmax_base(state.max));
//   state.sum = state.sum * factor + sum_j p_j;   out = out * factor + sum_j p_j value_j;
//
// and in the end out * normalizer(state.sum). A second part of the same row is merged as a tile is, with its max, and
// with its sum and out times exp2(part.max - softmax_base(state.max)). A NaN or +inf among a row's scores makes its sum
// NaN, which no later tile mends.
#pragma once

#include "dllm/macros.h"

namespace dllm {

constexpr float kNegativeInfinity = -__builtin_huge_valf();
constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;

// `Number` is float, or a vector of them: one row per lane.
template <typename Number>
struct SoftmaxState {
  Number max = Number{} + kNegativeInfinity;  // of the exponents so far
  Number sum = Number{};                      // of 2^(x_j - softmax_base(max))
};

// What exponents are taken relative to: their maximum. Guard: before the first finite score it is -inf, and
// -inf - -inf is NaN, where the sum of nothing is 0; relative to 0 it is 2^-inf = 0.
template <typename Number>
DLLM_HOST_DEVICE inline Number softmax_base(Number max) {
  return max == Number{} + kNegativeInfinity ? Number{} : max;
}

// Count the maximum of further exponents in; returns the exponent of the factor of all that was summed before.
template <typename Number>
DLLM_HOST_DEVICE inline Number raise_max(SoftmaxState<Number>& state, Number max) {
  const Number before = state.max;
  state.max = before > max ? before : max;
  return before - softmax_base(state.max);
}

// Guard: a row that saw nothing, or nothing but scores of -inf, has the sum 0 and gives 0 instead of 0 / 0.
DLLM_HOST_DEVICE inline float normalizer(float sum) { return sum == 0.0f ? 0.0f : 1.0f / sum; }

// log sum_j exp(scale * score_j); -inf for a row that saw nothing, whose max and log2(sum) are both -inf.
DLLM_HOST_DEVICE inline float log_sum_exp(float max, float log2_sum) { return kLn2 * (max + log2_sum); }

}  // namespace dllm
