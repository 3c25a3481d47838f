"""Uniform numbers of consecutive ids in counter-based streams."""

import torch
from torch import Tensor

from vllm_dllm.ops.load import require


def counter_uniform(keys: Tensor, first_id: int, num_ids: int) -> Tensor:
    """Draw the uniform numbers of consecutive ids in each stream; equals `noise.uniform` bit for bit.

    Args:
        keys: [num_rows] int64 from `noise.stream_keys`, any stride.
        first_id: vocabulary id of the first column, or `noise.STREAM` (-1).
        num_ids: number of columns, 0 or more.

    Returns: [num_rows, num_ids] float64 in the open interval (0, 1).

    Raises:
        KernelUnavailable: the op is not built for the device of `keys`.
        RuntimeError: an argument breaks the rules above; the message names it.
    """
    require("counter_uniform", keys.device.type)
    result: Tensor = torch.ops.vllm_dllm.counter_uniform(keys, first_id, num_ids)
    return result


def fake(keys: Tensor, first_id: int, num_ids: int) -> Tensor:
    """Return an empty [num_rows, num_ids] float64."""
    return keys.new_empty((keys.shape[0], num_ids), dtype=torch.float64)
