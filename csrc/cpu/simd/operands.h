// How attention holds its operands: what the products of panel.h multiply, from what lies in memory, and what becomes
// of the sums. Keys and values that are stored as elements are used where they lie; the others are made at `to`, and
// `staged` says where each row is.
#pragma once

#include "float_type.h"
#include "panel.h"

namespace dllm::cpu::DLLM_ISA {

constexpr int32_t kPanelLanes = kMaxVecs * kLanes;

// Scores of a panel: they begin at 0, whatever was there.
struct ScoreSums {
  float* scores;  // [.., kPanelLanes]

  VecF begin(int, int) const { return VecF{}; }
  void end(int i, int vec, VecF sum) const { store(scores + i * kPanelLanes + vec * kLanes, sum); }
};

// Weighted sums of values, which begin at what is there times `factor` and are kept where `is_concerned`.
template <int kVecs>
struct OutSums {
  float* out;  // [kVecs, head_dim, kLanes]
  int64_t vec_stride;
  const VecF (&factor)[kVecs];
  const VecI (&is_concerned)[kVecs];

  VecF begin(int i, int vec) const { return load(out + vec * vec_stride + i * kLanes) * factor[vec]; }
  void end(int i, int vec, VecF sum) const {
    float* to = out + vec * vec_stride + i * kLanes;
    store(to, is_concerned[vec] ? sum : load(to));
  }
};

// As floats.
template <typename FloatType>
struct Floats {
  using Type = FloatType;
  using Stored = typename Type::Stored;
  using Number = Float;
  static constexpr int kPerElement = 1;

  // Write a row into one lane of a panel.
  static void spread(const Stored* row, int32_t head_dim, float* lane) {
    for (int32_t dim = 0; dim < head_dim; dim += kRun) {
      const RunF run = Type::load(row + dim);
      for (int i = 0; i < kRun; ++i) {
        lane[(dim + i) * kLanes] = run[i];
      }
    }
  }

  static const float* stage(const float* row, int32_t, float*) { return row; }

  static const float* stage(const uint16_t* row, int32_t head_dim, float* to) {
    for (int32_t dim = 0; dim < head_dim; dim += kRun) {
      Float32::store(to + dim, Type::load(row + dim));
    }
    return to;
  }

  static void stage_keys(const Stored* const* rows, int32_t num_rows, int32_t head_dim, float* to,
                         const void** staged) {
    for (int32_t row = 0; row < num_rows; ++row) {
      staged[row] = stage(rows[row], head_dim, to + row * head_dim);
    }
  }

  static void stage_values(const Stored* const* rows, int32_t num_rows, int32_t head_dim, float* to,
                           const void** staged) {
    stage_keys(rows, num_rows, head_dim, to, staged);
  }

  // The staged values, from the dimension `first` on, a row for each.
  static Columns<float> values(const float*, const void* const* staged, int32_t, int32_t first) {
    return {staged, first};
  }

  // Weights are what they are; returns the depth of the product with them.
  template <int kVecs>
  static int64_t pair_up(float*, int64_t, int32_t num_rows) {
    return num_rows;
  }
};

#if defined(__AVX512BF16__)
// As pairs of bfloat16: keys and queries along head_dim, as they lie, values and weights along positions.
struct BFloat16Pairs {
  using Type = BFloat16;
  using Number = BFloat16Pair;
  static constexpr int kPerElement = 2;

  typedef int32_t Pair __attribute__((aligned(2), may_alias));
  typedef uint16_t Halves __attribute__((vector_size(4 * kLanes)));

  static void spread(const uint16_t* row, int32_t head_dim, int32_t* lane) {
    for (int32_t dim = 0; dim < head_dim; dim += kPerElement) {
      lane[dim / kPerElement * kLanes] = *reinterpret_cast<const Pair*>(row + dim);
    }
  }

  static void stage_keys(const uint16_t* const* rows, int32_t num_rows, int32_t, int32_t*, const void** staged) {
    for (int32_t row = 0; row < num_rows; ++row) {
      staged[row] = rows[row];
    }
  }

  // A row without a neighbour is paired with zeros.
  static void stage_values(const uint16_t* const* rows, int32_t num_rows, int32_t head_dim, int32_t* to, const void**) {
    for (int32_t row = 0; row < num_rows; row += kPerElement) {
      for (int32_t dim = 0; dim < head_dim; dim += kRun) {
        const RunU second = row + 1 < num_rows ? load_u16(rows[row + 1] + dim) : RunU{};
        *reinterpret_cast<UnalignedRunU*>(to) = load_u16(rows[row] + dim) | (second << 16);
        to += kRun;
      }
    }
  }

  static Matrix<int32_t> values(const int32_t* made, const void* const*, int32_t head_dim, int32_t first) {
    return {made + first, 1, head_dim};
  }

  static VecI pair(VecF first, VecF second) {
    const auto apart = reinterpret_cast<Halves>(
        _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(second), reinterpret_cast<__m512>(first)));
    Halves order;
    for (int lane = 0; lane < kLanes; ++lane) {
      order[2 * lane] = lane;
      order[2 * lane + 1] = kLanes + lane;
    }
    return reinterpret_cast<VecI>(__builtin_shuffle(apart, order));
  }

  // Round weights and write them over their floats, pair by pair.
  template <int kVecs>
  static int64_t pair_up(float* weights, int64_t stride, int32_t num_rows) {
    for (int32_t row = 0; row < num_rows; row += kPerElement) {
      for (int vec = 0; vec < kVecs; ++vec) {
        const float* first = weights + row * stride + vec * kLanes;
        const VecF second = row + 1 < num_rows ? load(first + stride) : VecF{};
        *reinterpret_cast<UnalignedVecI*>(weights + row / kPerElement * stride + vec * kLanes) =
            pair(load(first), second);
      }
    }
    return (num_rows + 1) / kPerElement;
  }
};

using BFloat16Operands = BFloat16Pairs;
#else
using BFloat16Operands = Floats<BFloat16>;
#endif

}  // namespace dllm::cpu::DLLM_ISA
