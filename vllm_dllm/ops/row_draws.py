"""How the tokens of a step's rows are drawn."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_dllm.ops.load import check_one_device, require


def row_draws(
    requests: Sequence[Tensor],
    is_masked: Tensor,
    place: Tensor | None,
    params: Sequence[Tensor],
    looks_ahead: bool,
) -> list[Tensor]:
    """Gather what the draws of rows depend on; does what `state.draws.torch_draws` does, which states it.

    All tensors are contiguous.

    Args:
        requests: slots and start, [num_reqs] int64 each.
        is_masked: [num_reqs, num_canvases, block_length] bool.
        place: [num_evaluated] int64, of each evaluated canvas among all; None: all are evaluated.
        params: by slot, seed and top_k int64, temperature and top_p float64, [num_slots] each.
        looks_ahead: whether the last canvas is of the next block.

    Returns: temperature, top_k, top_p and keys of `ops.vocab_stats.RowSampling`, of the evaluated canvases' rows.

    Raises:
        KernelUnavailable: the op is not built for the device of the canvases.
        RuntimeError: an argument breaks the rules above; the message names it.
    """
    require("row_draws", is_masked.device.type)
    draws: list[Tensor] = torch.ops.vllm_dllm.row_draws(requests, is_masked, place, params, looks_ahead)
    return draws


def fake(
    requests: Sequence[Tensor],
    is_masked: Tensor,
    place: Tensor | None,
    params: Sequence[Tensor],
    looks_ahead: bool,
) -> list[Tensor]:
    """Return empty draws."""
    check_one_device("row_draws", *requests, is_masked, place, *params)
    num_reqs, num_canvases, block_length = is_masked.shape
    num_rows = (num_reqs * num_canvases if place is None else place.shape[0]) * block_length
    types = (torch.float64, torch.int64, torch.float64, torch.int64)
    return [is_masked.new_empty(num_rows, dtype=each) for each in types]
