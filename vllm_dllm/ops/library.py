"""What the library of native ops says of itself; each function loads it, or raises KernelUnavailable."""

import torch

from vllm_dllm.ops.load import load_once


def cpu_isa() -> str:
    """Return the instruction set that the CPU kernels run with: portable, avx2, avx512 or avx512_bf16.

    Raises: RuntimeError if VLLM_DLLM_ISA names one that the machine or the build does not have.
    """
    load_once()
    isa: str = torch.ops.vllm_dllm.cpu_isa()
    return isa


def machine_isa() -> str:
    """Return the best instruction set that the machine has, in the build or not."""
    load_once()
    isa: str = torch.ops.vllm_dllm.machine_isa()
    return isa


def built_isas() -> list[str]:
    """Return the instruction sets that the CPU kernels are compiled for, the best one last."""
    load_once()
    isas: str = torch.ops.vllm_dllm.built_isas()
    return isas.split(",")


def cuda_archs() -> list[str]:
    """Return the architectures that the CUDA kernels are compiled for, like 80 and 90a; none without CUDA."""
    load_once()
    archs: str = torch.ops.vllm_dllm.cuda_archs()
    return archs.split(",") if archs else []
