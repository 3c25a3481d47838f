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
    num_reqs, num_nodes, _ = canvas.shape
    came_true = (next_canvas[:, :, None] == canvas[:, None]).all(-1) & is_valid[:, None]
    came_true[:, :, 0] = False  # a finished root stays as it is
    successor = came_true.byte().argmax(2)  # 0: none
    node = torch.zeros(num_reqs, 1, dtype=torch.int64, device=canvas.device)
    num_accepted = torch.zeros_like(node)
    for _ in range(num_nodes - 1):
        following = successor.gather(1, node)
        num_accepted += following > 0
        node = torch.where(following > 0, following, node)
    return Walk(node.squeeze(1), num_accepted.squeeze(1))
