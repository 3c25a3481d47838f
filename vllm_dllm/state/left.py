"""Rows left of blocks, under a logit shift: a refresh computes them, and they predict the blocks' first positions."""

from torch import Tensor


def predicting_rows(left: Tensor, slots: Tensor, hidden: Tensor, fresh: Tensor | None) -> Tensor:
    """Put the row left of each block, which a refresh computed last, before the block's other rows.

    Args:
        left: [num_slots, hidden_size], the rows that are kept; written to.
        slots: [num_nodes] int64.
        hidden: [num_nodes * block_length, hidden_size], the rows left of the positions of the blocks; written to.
        fresh: [num_fresh] int64, nodes whose own first row is that of this step's refresh; None: none.

    Returns: `hidden`.
    """
    first = hidden.view(len(slots), -1, hidden.shape[-1])[:, 0]
    if fresh is not None:
        left[slots[fresh]] = first[fresh]
    first.copy_(left[slots])
    return hidden
