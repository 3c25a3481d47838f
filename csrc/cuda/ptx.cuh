// PTX instructions that C++ has no words for, one each. The emulator has the same functions in tests/simt/ptx.h.
//
// Fragments of a warp (PTX ISA, "Matrix Fragments for mma.m16n8k16"), each register two neighbours of a row:
//   a  16 x 16: register i of lane l holds row l / 4 + 8 * (i % 2), columns 2 * (l % 4) + 8 * (i / 2) and the next
//   b  16 x 8:  register i holds rows 2 * (l % 4) + 8 * i and the next, of column l / 4
//   c  16 x 8:  number i holds row l / 4 + 8 * (i / 2), column 2 * (l % 4) + i % 2
#pragma once

#include <cstdint>

#include "float16.cuh"
#include "launch.h"
#ifndef __CUDACC__
#include "simt/ptx.h"
#else

namespace dllm::cuda {

__device__ inline uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Begin to copy 16 bytes to shared memory; zeros, and nothing is read, unless `valid`. The address is one of global
// memory in any case: what a null pointer does where nothing is copied, the PTX ISA does not say.
__device__ inline void copy_async_16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}

// Close a group of the copies that the thread began.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Wait for all of the thread's groups but the last `pending`.
template <int pending>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Load four 8 x 8 matrices of 16-bit numbers; lane l gives the address of row l % 8 of matrix l / 8. Register i is of
// matrix i: row l / 4, columns 2 * (l % 4) and the next.
__device__ inline void load_matrices(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same, each matrix transposed: rows 2 * (l % 4) and the next, column l / 4.
__device__ inline void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// c += a b
template <typename Float>
__device__ inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<Float, Half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    static_assert(std::is_same_v<Float, BFloat16>);
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

}  // namespace dllm::cuda

#endif
