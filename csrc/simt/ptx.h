// The functions of cuda/ptx.cuh, written down from the PTX ISA's description of each instruction.
#pragma once

#include "simt.h"

namespace dllm::cuda {

inline void copy_async_16(void* shared, const void* global, bool valid) {
  simt::copy_async(shared, global, valid ? 16 : 0, valid ? 0 : 16);
}

inline void commit_copies() { simt::commit_copies(); }

template <int pending>
void wait_for_copies() {
  simt::wait_for_copies(pending);
}

struct MatrixRow {
  uint16_t numbers[8];
};

// Every lane reads the row whose address it gives, as it arrives: ldmatrix is no barrier for memory.
inline simt::Lanes<MatrixRow> matrix_rows(const char* operation, const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) {
    simt::fail("a row of ldmatrix is not aligned to 16 bytes");
  }
  MatrixRow numbers;
  std::memcpy(&numbers, row, sizeof(numbers));
  return simt::Lanes<MatrixRow>(operation, numbers);
}

inline void load_matrices(uint32_t (&to)[4], const void* row) {
  const auto rows = matrix_rows("ldmatrix", row);
  const unsigned column = simt::lane() % 4 * 2;
  for (unsigned i = 0; i < 4; ++i) {
    const MatrixRow from = rows[8 * i + simt::lane() / 4];
    to[i] = from.numbers[column] | static_cast<uint32_t>(from.numbers[column + 1]) << 16;
  }
}

inline void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
  const auto rows = matrix_rows("ldmatrix.trans", row);
  const unsigned first = simt::lane() % 4 * 2;
  const unsigned column = simt::lane() / 4;
  for (unsigned i = 0; i < 4; ++i) {
    const uint32_t low = rows[8 * i + first].numbers[column];
    const uint32_t high = rows[8 * i + first + 1].numbers[column];
    to[i] = low | high << 16;
  }
}

struct Operands {
  uint32_t a[4];
  uint32_t b[2];
};

// The number of a register pair: `half` 0 is the lower one.
template <typename Float>
float part(uint32_t pair, unsigned half) {
  return to_float(Float{static_cast<uint16_t>(pair >> 16 * half)});
}

template <typename Float>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const simt::Lanes<Operands> lanes("mma", {{a[0], a[1], a[2], a[3]}, {b0, b1}});
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = simt::lane() / 4 + 8 * (i / 2);
    const unsigned column = simt::lane() % 4 * 2 + i % 2;
    float sum = 0.0f;
    for (unsigned k = 0; k < 16; ++k) {
      const uint32_t a_pair = lanes[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2];
      const uint32_t b_pair = lanes[column * 4 + k % 8 / 2].b[k / 8];
      sum += part<Float>(a_pair, k % 2) * part<Float>(b_pair, k % 2);
    }
    c[i] += sum;
  }
}

}  // namespace dllm::cuda
