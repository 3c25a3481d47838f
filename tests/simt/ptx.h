// The functions of csrc/cuda/ptx.cuh, written down from the PTX ISA's description of each instruction.
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

// A lane's registers of a and b, two numbers each.
struct Operands {
  float a[8];
  float b[4];
};

template <typename Float>
Operands operands(const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t pairs[6] = {a[0], a[1], a[2], a[3], b0, b1};
  float numbers[12];
  for (unsigned i = 0; i < 12; ++i) {
    numbers[i] = to_float(Float{static_cast<uint16_t>(pairs[i / 2] >> i % 2 * 16)});
  }
  return std::bit_cast<Operands>(numbers);
}

template <typename Float>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const simt::Lanes<Operands> lanes("mma", operands<Float>(a, b0, b1));
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = simt::lane() / 4 + 8 * (i / 2);
    const unsigned column = simt::lane() % 4 * 2 + i % 2;
    float sum = 0.0f;
    for (unsigned k = 0; k < 16; ++k) {
      const float of_a = lanes[row % 8 * 4 + k % 8 / 2].a[k / 8 * 4 + row / 8 * 2 + k % 2];
      const float of_b = lanes[column * 4 + k % 8 / 2].b[k / 8 * 2 + k % 2];
      sum += of_a * of_b;
    }
    c[i] += sum;
  }
}

}  // namespace dllm::cuda
