// What every binding shares: the op library and the choice of device. Each op has one file here: schema, checks,
// launch.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#ifdef DLLM_CUDA
#include <torch/csrc/stable/accelerator.h>
#endif

#include "check.h"
#include "dllm/types.h"

// DLLM_CUDA: CUDA kernels are linked in. DLLM_SIMT: a library for tests, whose ops run the CUDA kernels on a CPU
// (tests/simt/README.md).
#ifdef DLLM_SIMT
#define DLLM_LIBRARY vllm_dllm_simt
#else
#define DLLM_LIBRARY vllm_dllm
#endif

#ifdef DLLM_CUDA
#define DLLM_IMPL_CUDA(op) \
  STABLE_TORCH_LIBRARY_IMPL(DLLM_LIBRARY, CUDA, m) { m.impl(#op, TORCH_BOX(&dllm::op)); }
#else
#define DLLM_IMPL_CUDA(op)
#endif

// Register `dllm::op` under its schema for every device that it is built for.
#define DLLM_OP(op, schema)                                                              \
  STABLE_TORCH_LIBRARY_FRAGMENT(DLLM_LIBRARY, m) { m.def(#op schema); }                  \
  STABLE_TORCH_LIBRARY_IMPL(DLLM_LIBRARY, CPU, m) { m.impl(#op, TORCH_BOX(&dllm::op)); } \
  DLLM_IMPL_CUDA(op)

#if defined(DLLM_SIMT)
#define DLLM_KERNEL(op) ::dllm::Kernel(#op, nullptr, ::dllm::cuda::op)
#elif defined(DLLM_CUDA)
#define DLLM_KERNEL(op) ::dllm::Kernel(#op, ::dllm::cpu::op, ::dllm::cuda::op)
#else
#define DLLM_KERNEL(op) ::dllm::Kernel(#op, ::dllm::cpu::op, nullptr)
#endif

namespace dllm {

#ifdef DLLM_SIMT
constexpr bool kRunsCudaOnCpu = true;
#else
constexpr bool kRunsCudaOnCpu = false;
#endif

// A kernel on every device it is built for.
template <typename Args>
struct Kernel {
  using Cpu = void (*)(const Args&);
  using Cuda = const char* (*)(const Args&, Stream);

  Kernel(const char* op, Cpu cpu, Cuda cuda) : op(op), cpu(cpu), cuda(cuda) {}
  Kernel(const char* op, Cpu cpu, std::nullptr_t) : op(op), cpu(cpu), cuda(nullptr) {}
  Kernel(const char* op, std::nullptr_t, Cuda cuda) : op(op), cpu(nullptr), cuda(cuda) {}

  // Run on the device of `tensor`, on its current stream.
  void launch(const Tensor& tensor, const Args& args) const {
#if defined(DLLM_SIMT)
    (void)tensor;
    check_launch(cuda(args, nullptr));
#else
#if defined(DLLM_CUDA)
    if (tensor.is_cuda()) {
      const torch::stable::accelerator::DeviceGuard guard(tensor.get_device_index());
      void* stream = nullptr;
      TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
      check_launch(cuda(args, static_cast<Stream>(stream)));
      return;
    }
#endif
    (void)tensor;
    cpu(args);
#endif
  }

 private:
  void check_launch(const char* error) const {
    check(error == nullptr, op, "the CUDA launch failed: ", error == nullptr ? "" : error,
          "; an earlier kernel may be the cause, run again with CUDA_LAUNCH_BLOCKING=1");
  }

  const char* op;
  Cpu cpu;
  Cuda cuda;
};

}  // namespace dllm
