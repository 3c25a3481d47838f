"""Accept the drafts that came true.

Spiffy (arXiv:2509.18085v4) sec. 4.1, Algorithm 1, with equality of the whole canvas in place of the graph's edges: it
accepts all that the edges do, whatever number of positions a step unmasks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Walk:
    """How far each request came in one forward."""

    node: Tensor  # [num_reqs] int64, the last node accepted; 0 is the root
    num_accepted: Tensor  # [num_reqs] int64


def accept(canvas: Tensor, next_canvas: Tensor, is_valid: Tensor) -> Walk:
    """Walk from the root as long as the next canvas is one that was evaluated too.

    Every accepted node has fewer masked positions than the one before, so a walk ends.

    Args:
        canvas: [num_reqs, num_nodes, block_length] int64, evaluated canvases, the root first.
        next_canvas: [num_reqs, num_nodes, block_length] int64, what the decoder makes of each.
        is_valid: [num_reqs, num_nodes] bool, False for nodes that must not be accepted.
    """
    num_nodes = canvas.shape[1]
    came_true = (next_canvas[:, :, None] == canvas[:, None]).all(-1) & is_valid[:, None]
    came_true[:, :, 0] = False  # a finished root stays as it is
    follows, successor = came_true.byte().max(2)
    itself = torch.arange(num_nodes, device=canvas.device)
    node = torch.where(follows > 0, successor, itself)
    num_accepted = follows.long()
    # Each round doubles the steps that `node` is ahead: log2 of the longest walk, not the walk itself.
    for _ in range((num_nodes - 1).bit_length()):
        num_accepted = num_accepted + num_accepted.gather(1, node)
        node = node.gather(1, node)
    return Walk(node[:, 0], num_accepted[:, 0])
