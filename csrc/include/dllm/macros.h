// Marks functions that host and device share.
#pragma once

#ifdef __CUDACC__
#define DLLM_HOST_DEVICE __host__ __device__
#else
#define DLLM_HOST_DEVICE
#endif
