"""What one forward comes to for each request: canvases decided in turn, as far as the drafts came true."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_dllm.ops.load import check_one_device, require


def decide_walk(  # noqa: PLR0913 - the arguments of the op, once per step
    canvas: Tensor,
    is_valid: Tensor,
    end: Tensor | None,
    evaluated: Tensor | None,
    rows: Sequence[Tensor],
    params: Sequence[Tensor],
    memory: Sequence[Tensor],
    mask_token_id: int,
    unmasks_first_alone: bool,
    sub_block_length: int,
) -> list[Tensor]:
    """Decide and walk; does what `unmask.walk.walk` does, which states it.

    Scores agree to rounding. A path has `num_nodes` nodes at most, also where canvases follow each other in a circle,
    which no policy makes. All tensors are contiguous.

    Args:
        canvas: [num_reqs, num_nodes, block_length] int64, canvases, the root first.
        is_valid: [num_reqs, num_nodes] bool, False for nodes that must not be accepted.
        end: [num_reqs, block_length] int64 of a look-ahead, whose next root is the last node.
        evaluated: [num_reqs, num_nodes] int64, the place of each node among those that are evaluated, -1 for the
            others, which are not valid; None: all are.
        rows: of `PartialStats` token_ids, token_logits, top_ids, top_logits, rest, weighted and, if policies look at
            the sampled distribution, sampled_rest and sampled_weighted; rows of the evaluated nodes in the
            order of requests, nodes, positions, at least two candidates each.
        params: the tensors of `PolicyParams`: [num_reqs] each, but counts and times, [block_length, num_reqs].
        memory: where a policy of the batch remembers something: credit_ids and credits of its state, contiguous, and
            the given logits of the rows; else nothing.
        mask_token_id: what stands for masked in a canvas.
        unmasks_first_alone: whether a block's first position is unmasked first, and alone.
        sub_block_length: of parts of a block that are unmasked one after another; 0: it has none.

    Returns: the fields of `unmask.walk.Trajectory`, of `candidates` its two, of `state` those of the memory.

    Raises:
        KernelUnavailable: the op is not built for the device of `canvas`.
        RuntimeError: an argument breaks the rules above; the message names it.
    """
    require("decide_walk", canvas.device.type)
    trajectory: list[Tensor] = torch.ops.vllm_dllm.decide_walk(
        canvas, is_valid, end, evaluated, rows, params, memory, mask_token_id, unmasks_first_alone, sub_block_length
    )
    return trajectory


def fake(  # noqa: PLR0913 - as above
    canvas: Tensor,
    is_valid: Tensor,
    end: Tensor | None,
    evaluated: Tensor | None,
    rows: Sequence[Tensor],
    params: Sequence[Tensor],
    memory: Sequence[Tensor],
    mask_token_id: int,
    unmasks_first_alone: bool,
    sub_block_length: int,
) -> list[Tensor]:
    """Return an empty trajectory."""
    check_one_device("decide_walk", canvas, is_valid, end, evaluated, *rows, *params, *memory)
    num_reqs, num_nodes, block_length = canvas.shape
    candidates = (num_reqs, block_length, rows[2].shape[1])
    return [
        canvas.new_empty((num_reqs, block_length)),
        canvas.new_empty((num_reqs, block_length)),
        canvas.new_empty((num_reqs, num_nodes)),
        canvas.new_empty((num_reqs, block_length)),
        canvas.new_empty(num_reqs),
        canvas.new_empty(num_reqs),
        canvas.new_empty(num_reqs),
        canvas.new_empty(num_reqs, dtype=torch.bool),
        canvas.new_empty(num_reqs, dtype=torch.bool),
        canvas.new_empty(candidates),
        canvas.new_empty(candidates, dtype=torch.float64),
        *(torch.empty_like(field) for field in memory[:2]),
    ]
