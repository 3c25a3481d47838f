"""How far the drafts of each request came true in one forward."""

import torch
from torch import Tensor

from vllm_dllm.ops.load import check_one_device, require


def verify_walk(canvas: Tensor, next_canvas: Tensor, is_valid: Tensor) -> tuple[Tensor, Tensor]:
    """Walk from the root as long as the next canvas is one that was evaluated too; equals `draft.verify.accept`.

    A walk ends after `num_nodes - 1` steps, also where canvases follow each other in a circle, which no decoder does.

    Args:
        canvas: [num_reqs, num_nodes, block_length] int64, contiguous: evaluated canvases, the root first.
        next_canvas: [num_reqs, num_nodes, block_length] int64, contiguous: what the decoder makes of each.
        is_valid: [num_reqs, num_nodes] bool, contiguous: False for nodes that must not be accepted.

    Returns: the last node accepted (0 is the root), and how many were; [num_reqs] int64 each.

    Raises:
        KernelUnavailable: the op is not built for the device of `canvas`.
        RuntimeError: an argument breaks the rules above; the message names it.
    """
    require("verify_walk", canvas.device.type)
    node, num_accepted = torch.ops.vllm_dllm.verify_walk(canvas, next_canvas, is_valid)
    return node, num_accepted


def fake(canvas: Tensor, next_canvas: Tensor, is_valid: Tensor) -> tuple[Tensor, Tensor]:
    """Return two empty [num_reqs] int64."""
    check_one_device("verify_walk", canvas, next_canvas, is_valid)
    return canvas.new_empty(canvas.shape[0]), canvas.new_empty(canvas.shape[0])
