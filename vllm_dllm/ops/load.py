"""Find and load the library of native ops; explain its absence."""

import logging
import os
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from vllm_dllm.errors import KernelUnavailable

logger = logging.getLogger("vllm.dllm")

T = TypeVar("T")

OPS = ("decide_walk", "draft_graph_attention", "propose_nodes", "row_draws", "settle_step", "step_rows", "vocab_stats")
"""Every op with a kernel. Each has a module of its name here, with its typed function and its `fake`: the shapes and
dtypes of its results, for tracing."""

NAMESPACE = "vllm_dllm"
LIBRARY = Path(os.environ.get("VLLM_DLLM_LIBRARY", Path(__file__).parent.parent / "_C.so"))
"""Another build of the ops can be named, such as the one with sanitizers (`make sanitize`)."""

BUILD_COMMAND = "`pip install --force-reinstall --no-deps --no-cache-dir vllm-dllm`, in a checkout `make setup`"

_DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}


def load_library(path: Path = LIBRARY) -> None:
    """Load the ops into torch and register their fakes.

    Raises: KernelUnavailable if the library is missing, does not fit the installed torch, or is older than this
    package.
    """
    if not path.is_file():
        raise KernelUnavailable(f"vllm-dllm's native ops are not built: {path} is missing; build them: {BUILD_COMMAND}")
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise KernelUnavailable(
            f"vllm-dllm's native ops do not load with torch {torch.__version__}: {error}; rebuild them: {BUILD_COMMAND}"
        ) from error
    lacking = [op for op in OPS if not hasattr(getattr(torch.ops, NAMESPACE), op)]
    if lacking:
        raise KernelUnavailable(
            f"{path} is older than vllm-dllm and lacks {', '.join(lacking)}; rebuild it: {BUILD_COMMAND}"
        )
    for op in OPS:
        torch.library.register_fake(f"{NAMESPACE}::{op}", import_module(f"vllm_dllm.ops.{op}").fake)


load_once = cache(load_library)
"""`load_library` at the first call."""


@cache
def _check(op: str, device_type: str) -> None:
    load_once()
    if device_type == "meta":
        return
    key = _DISPATCH_KEYS.get(device_type)
    if key is None:
        raise KernelUnavailable(f"{op} has no kernel for {device_type} tensors; use one of {sorted(_DISPATCH_KEYS)}")
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{op}", key):
        raise KernelUnavailable(
            f"{op} was built for the CPU alone, as torch had no CUDA then; with such a torch and nvcc rebuild it: "
            f"{BUILD_COMMAND}"
        )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def require(op: str, device_type: str) -> None:
    """Make sure that an op has a kernel for a kind of device, loading the library on first use.

    Args:
        op: name of the op, without namespace.
        device_type: "cpu", "cuda" or "meta".

    Raises: KernelUnavailable.
    """
    _check(op, device_type)


def native_or_twin(op: str, device_type: str, what: str, native: T, twin: T) -> T:
    """Return what calls an op, or its twin in torch where the op has no kernel for the device; and say so.

    Args:
        op, device_type: as in `require`.
        what: is done by it, for the log.
        native, twin: of the same signature.
    """
    try:
        require(op, device_type)
    except KernelUnavailable as error:
        logger.warning("%s by torch: %s", what, error)
        return twin
    logger.info("%s by a native op for %s.", what, device_type)
    return native


def check_one_device(op: str, *tensors: Tensor | None) -> None:
    """Refuse tensors of several devices; a fake does so, since one tensor on `meta` makes torch call it for all.

    Raises: RuntimeError.
    """
    devices = sorted({str(tensor.device) for tensor in tensors if tensor is not None})
    if len(devices) > 1:
        raise RuntimeError(f"{op}: the tensors are on {' and '.join(devices)}; allowed is one device; move them")
