// Products of a matrix with a panel: `out[i][lane] = sum_k a[i][k] * b[k][lane]`.
//
// A panel holds what belongs to kVecs * kLanes rows of a forward, one row per lane: b[k] and out[i] are vectors over
// rows. So a row's result is made by the same operations in the same order whatever else is in the panel, and the
// scalars of `a` are taken from memory as they lie, in either orientation: no transposition, no packing. `a` is a
// Matrix, or consists of rows that lie anywhere.
#pragma once

#include "vec.h"

namespace dllm::cpu::DLLM_ISA {

constexpr int kMaxVecs = 3;

// Elements of `a` and `b`: floats.
struct Float {
  using Element = float;
  static VecF multiply_add(float a, const float* b, VecF sum) { return splat(a) * load(b) + sum; }
};

#if defined(__AVX512BF16__)
// Elements of `a` and `b`: two bfloat16, neighbours in k.
struct BFloat16Pair {
  using Element = int32_t;
  static VecF multiply_add(int32_t a, const int32_t* b, VecF sum) {
    const __m512i pairs = reinterpret_cast<__m512i>(*reinterpret_cast<const UnalignedVecI*>(b));
    return reinterpret_cast<VecF>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum),
                                                   reinterpret_cast<__m512bh>(_mm512_set1_epi32(a)),
                                                   reinterpret_cast<__m512bh>(pairs)));
  }
};
#endif

template <typename Element>
struct Matrix {
  const Element* data;
  int64_t row_stride;    // elements from a[i][k] to a[i + 1][k]
  int64_t depth_stride;  // elements from a[i][k] to a[i][k + 1]

  Element operator()(int i, int64_t k) const { return data[i * row_stride + k * depth_stride]; }
};

// Element k of a row that may be unaligned and of another type.
template <typename Element>
inline Element element_of(const void* row, int64_t k) {
  Element element;
  __builtin_memcpy(&element, static_cast<const Element*>(row) + k, sizeof(Element));
  return element;
}

// a[i] is a row.
template <typename Element>
struct Rows {
  const void* const* row;

  Element operator()(int i, int64_t k) const { return element_of<Element>(row[i], k); }
};

// a[i] is the column `first` + i of rows.
template <typename Element>
struct Columns {
  const void* const* row;
  int64_t first;

  Element operator()(int i, int64_t k) const { return element_of<Element>(row[k], first + i); }
};

template <typename Element>
struct Panel {
  const Element* data;
  int64_t depth_stride;  // elements from b[k] to b[k + 1]
  int64_t vec_stride;    // elements from one vector of lanes to the next
};

// Multiply a register tile. `sums` says where each sum begins and what becomes of it: begin(i, vec), end(i, vec, sum).
template <typename Number, int kRows, int kVecs, typename A, typename Sums>
inline void tile_product(const A& a, Panel<typename Number::Element> b, int64_t depth, const Sums& sums) {
  VecF sum[kRows][kVecs];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 3
    for (int vec = 0; vec < kVecs; ++vec) {
      sum[i][vec] = sums.begin(i, vec);
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const typename Number::Element scalar = a(i, k);
#pragma GCC unroll 3
      for (int vec = 0; vec < kVecs; ++vec) {
        sum[i][vec] = Number::multiply_add(scalar, b.data + k * b.depth_stride + vec * b.vec_stride, sum[i][vec]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 3
    for (int vec = 0; vec < kVecs; ++vec) {
      sums.end(i, vec, sum[i][vec]);
    }
  }
}

// Sums that are added to `out`.
struct AddTo {
  float* out;
  int64_t row_stride;

  VecF begin(int i, int vec) const { return load(out + i * row_stride + vec * kLanes); }
  void end(int i, int vec, VecF sum) const { store(out + i * row_stride + vec * kLanes, sum); }
};

template <typename Number, int kRows, int kVecs>
inline void tile_product(Matrix<typename Number::Element> a, const typename Number::Element* b, int64_t b_stride,
                         int64_t depth, float* out, int64_t out_stride) {
  tile_product<Number, kRows, kVecs>(a, Panel<typename Number::Element>{b, b_stride, kLanes}, depth,
                                     AddTo{out, out_stride});
}

}  // namespace dllm::cpu::DLLM_ISA
