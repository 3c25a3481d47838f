"""Windows that slide, decided together with their drafts: each state's own window, and the states that came true.

A *state* of a request is what a step evaluates: the root, its present window, or a draft (`draft.windows`). With drafts
they are canvases of two windows from the root's begin on. What is known at a state's front is final in it, so its
*own window* begins behind that, where it would if the state were a request's present one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_dllm.unmask.walk import Nodes


def num_at_front(canvas: Tensor, room: Tensor, mask_token_id: int) -> Tensor:
    """Return how many positions are known at the fronts of canvases, [...] int64.

    Args:
        canvas: [..., width] int64.
        room: [...] int64, positions up to the row's end.
        mask_token_id: what stands for masked.
    """
    is_within = torch.arange(canvas.shape[-1], device=canvas.device) < room[..., None]
    return ((canvas != mask_token_id) & is_within).long().cumprod(-1).sum(-1)


@dataclass(frozen=True, slots=True)
class OwnWindows:
    """The own windows of evaluated states."""

    request: Tensor  # [num_evaluated] int64
    state: Tensor  # [num_evaluated, width] int64, the canvases
    front: Tensor  # [num_evaluated] int64, positions before the window
    canvas: Tensor  # [num_evaluated, window] int64
    is_masked: Tensor  # [num_evaluated, window] bool

    @classmethod
    def of(cls, nodes: Nodes, room: Tensor, window: int, mask_token_id: int) -> "OwnWindows":
        """Take those of a step.

        Args:
            nodes: the states.
            room: [num_reqs] int64, positions from the roots on up to the row's end.
            window: positions of a window.
            mask_token_id: what stands for masked.
        """
        request = torch.arange(len(nodes.canvas), device=nodes.canvas.device)
        request = nodes.per_evaluated(request[:, None].expand(nodes.depth.shape))
        state = nodes.per_evaluated(nodes.canvas)
        front = num_at_front(state, room[request], mask_token_id)
        canvas = state.gather(1, front[:, None] + torch.arange(window, device=state.device))
        return cls(request, state, front, canvas, canvas == mask_token_id)

    @property
    def place(self) -> Tensor:
        """[num_evaluated, window] int64, positions of the windows in their states' canvases."""
        return self.front[:, None] + torch.arange(self.canvas.shape[1], device=self.front.device)

    def unmasked(self, chosen: Tensor, token_ids: Tensor) -> Tensor:
        """Return the states that a step makes of these, [num_evaluated, width] int64.

        Args:
            chosen: [num_evaluated, window] bool, which positions it unmasks.
            token_ids: [num_evaluated, window] int64, with what.
        """
        return self.state.scatter(1, self.place, torch.where(chosen, token_ids, self.canvas))

    @staticmethod
    def index(nodes: Nodes, node: Tensor) -> Tensor:
        """Return which of the evaluated states a node [num_reqs] int64 of each request is."""
        return node if nodes.evaluated is None else nodes.evaluated.gather(1, node[:, None]).squeeze(1)

    def nodes(self) -> Nodes:
        """Return the windows as the roots of requests, in the order of the evaluated states."""
        one = torch.ones_like(self.canvas[:, :1])
        return Nodes(self.canvas[:, None], self.is_masked[:, None], one.bool(), one - 1)


@dataclass(frozen=True, slots=True)
class WalkedWindows:
    """What a step came to."""

    canvas: Tensor  # [num_reqs, width] int64, the last state that was made
    node: Tensor  # [num_reqs] int64, from which
    num_accepted: Tensor  # [num_reqs] int64, drafts that came true


def walk_windows(nodes: Nodes, after: Tensor, is_over: Tensor, mask_token_id: int) -> WalkedWindows:
    """Go from the roots on as long as the next state is one that was evaluated, too, and does not end the reply.

    Args:
        nodes: the states; each draft of a request knows another number of positions, and more than what it follows.
        after: [num_evaluated, width] int64, the states that a step makes of the evaluated ones.
        is_over: [num_evaluated] bool, which of these end their replies.
        mask_token_id: what stands for masked.
    """
    num_reqs, num_nodes, width = nodes.canvas.shape
    made, goes_on = after, ~is_over
    if nodes.place is not None:
        made = nodes.canvas.flatten(0, 1).index_copy(0, nodes.place, after)
        goes_on = nodes.is_valid.flatten().index_copy(0, nodes.place, goes_on)
    made, goes_on = made.view(num_reqs, num_nodes, width), goes_on.view(num_reqs, num_nodes)
    # Of what a state becomes one draft alone can be it, that which knows as much: not all pairs need to be compared.
    num_masked, num_left = nodes.is_masked.sum(2), (made == mask_token_id).sum(2)
    can_be = (num_left[:, :, None] == num_masked[:, None]) & nodes.is_valid[:, None]
    can_follow, follower = can_be.byte().max(2)  # where none can, it is any
    is_it = (made == nodes.canvas.gather(1, follower[..., None].expand(-1, -1, width))).all(2)
    follows = is_it & (can_follow > 0) & goes_on & (num_left < num_masked)
    request = torch.arange(num_reqs, device=made.device)
    node, num_accepted = torch.zeros_like(request), torch.zeros_like(request)
    for _ in range(num_nodes - 1):
        found = follows[request, node]
        node, num_accepted = torch.where(found, follower[request, node], node), num_accepted + found
    return WalkedWindows(made[request, node], node, num_accepted)
