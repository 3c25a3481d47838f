"""Arrays on the host: their types, and their way to a device, on which nobody waits for a copy."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IntArray = NDArray[np.int64]
Int32Array = NDArray[np.int32]
BoolArray = NDArray[np.bool_]


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """Return an array on a device; on a CPU the tensor shares the array's memory."""
    return _pinned(array, device).to(device, non_blocking=True)


def write(array: NDArray[Any], into: Tensor) -> None:
    """Write an array into a tensor of its shape; the array may be changed as soon as this returns."""
    into.copy_(_pinned(array, into.device), non_blocking=True)


def _pinned(array: NDArray[Any], device: torch.device) -> Tensor:
    """Return a tensor from which a GPU copies without the host: page-locked memory that nobody else writes."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory() if device.type == "cuda" else tensor
