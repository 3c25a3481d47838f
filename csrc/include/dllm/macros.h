// Marks functions that host and device share.
//
// On the host they are always inlined: an out-of-line copy that one instruction set's build of cpu/simd/ emits could be
// linked into another's.
#pragma once

#ifdef __CUDACC__
#define DLLM_HOST_DEVICE __host__ __device__
#else
#define DLLM_HOST_DEVICE __attribute__((always_inline))
#endif
