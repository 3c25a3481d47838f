// One step of online softmax over the scores of a panel, and which of the staged positions a lane sees.
#pragma once

#include "dllm/softmax_state.h"
#include "operands.h"

namespace dllm::cpu::DLLM_ISA {

// Which of the staged positions a lane sees: all.
struct WholeSegment {
  template <int kVecs>
  struct Lanes {
    Lanes(WholeSegment, int32_t) {}
    VecF select(int32_t, int, VecF seen, VecF) const { return seen; }
  };
};

// Own rows up to the lane's own one; the first row's first lane is `first_lane`.
struct Diagonal {
  int32_t first_lane;
  int32_t lanes_per_row;

  template <int kVecs>
  struct Lanes {
    Lanes(const Diagonal& diagonal, int32_t first_vec) {
      for (int lane = 0; lane < kVecs * kLanes; ++lane) {
        last[lane / kLanes][lane % kLanes] = (first_vec * kLanes + lane - diagonal.first_lane) / diagonal.lanes_per_row;
      }
    }

    VecF select(int32_t i, int vec, VecF seen, VecF unseen) const { return last[vec] >= splat(i) ? seen : unseen; }

    VecI last[kVecs];
  };
};

// Turn scores into weights, 0 in lanes that are not concerned; `factor` is that of all that was summed before.
template <int kVecs, typename Seen>
inline void softmax_step(float* scores, float exponent_scale, int32_t num_positions, const VecI (&is_concerned)[kVecs],
                         const Seen& seen, SoftmaxState<VecF>* state, VecF (&factor)[kVecs]) {
  const VecF none = splat(kNegativeInfinity);
  const VecF scale = splat(exponent_scale);
  VecF top[kVecs];
  VecF base[kVecs];
  VecF sum[kVecs];
  for (int vec = 0; vec < kVecs; ++vec) {
    top[vec] = none;
    sum[vec] = VecF{};
  }
  for (int32_t i = 0; i < num_positions; ++i) {
    for (int vec = 0; vec < kVecs; ++vec) {
      top[vec] = max(top[vec], seen.select(i, vec, load(scores + i * kPanelLanes + vec * kLanes), none));
    }
  }
  for (int vec = 0; vec < kVecs; ++vec) {
    factor[vec] = exp2(raise_max(state[vec], is_concerned[vec] ? top[vec] * scale : none));
    base[vec] = softmax_base(state[vec].max);
  }
  for (int32_t i = 0; i < num_positions; ++i) {
    for (int vec = 0; vec < kVecs; ++vec) {
      float* score = scores + i * kPanelLanes + vec * kLanes;
      const VecF weight = exp2(load(score) * scale - base[vec]);
      const VecF concerned = is_concerned[vec] ? seen.select(i, vec, weight, VecF{}) : VecF{};
      store(score, concerned);
      sum[vec] = sum[vec] + concerned;
    }
  }
  for (int vec = 0; vec < kVecs; ++vec) {
    state[vec].sum = state[vec].sum * factor[vec] + sum[vec];
  }
}

}  // namespace dllm::cpu::DLLM_ISA
