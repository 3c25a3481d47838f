"""Windows that slide, with drafts: whose window lies where, and which states come true."""

import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_dllm.unmask.walk import Nodes
from vllm_dllm.unmask.windows import OwnWindows, num_at_front, walk_windows

M, W = 0, 3
ROOTS = torch.tensor([[M, 8, M, M, M, M], [M, M, M, M, 1, 1]])  # the second one's row ends
DRAFTS = torch.tensor([[[7, 8, M, M, M, M], [7, 8, 9, M, M, M]], [[M, 5, M, M, 1, 1], [M, 5, 6, M, 1, 1]]])
ROOM = torch.tensor([9, 4])


def make(is_valid: torch.Tensor) -> Nodes:
    return Nodes.of_roots(ROOTS, M).with_drafts(DRAFTS, is_valid, torch.tensor([[1, 2]] * 2), M)


def test_what_is_behind_the_row_is_not_at_the_front() -> None:
    canvas = torch.tensor([[7, 8, M], [7, 8, 1]])
    assert num_at_front(canvas, torch.tensor([3, 2]), M).tolist() == [2, 2]


def test_a_states_own_window_begins_behind_its_front() -> None:
    """The second request has one draft alone."""
    nodes = make(torch.ones(2, 2, dtype=torch.bool))
    nodes = nodes.only(torch.tensor([[0, 1, 2], [3, 4, -1]]), torch.tensor([0, 1, 2, 3, 4]))
    own = OwnWindows.of(nodes, ROOM, W, M)
    assert own.request.tolist() == [0, 0, 0, 1, 1]
    assert own.front.tolist() == [0, 2, 3, 0, 0]
    assert own.canvas.tolist() == [[M, 8, M], [M, M, M], [M, M, M], [M, M, M], [M, 5, M]]
    assert own.place[2].tolist() == [3, 4, 5]
    assert own.nodes().canvas.shape == (5, 1, W)
    assert own.index(nodes, torch.tensor([2, 1])).tolist() == [2, 4]


def test_a_walk_goes_on_as_long_as_states_came_true() -> None:
    """Whatever a draft that is not reached would become, and over a draft that a step skips."""
    chosen = torch.zeros(6, W, dtype=torch.bool)
    token_ids = torch.full((6, W), 9)
    chosen[0, [0, 2]], token_ids[0, 0] = True, 7  # the first root's step unmasks two positions: its second draft
    chosen[2, 1] = True  # which goes on behind the root's window
    chosen[3, 2], chosen[4:, 2] = True, True  # the second root's step unmasks another position than its draft has
    nodes = make(torch.ones(2, 2, dtype=torch.bool))
    own = OwnWindows.of(nodes, ROOM, W, M)
    after, is_over = own.unmasked(chosen, token_ids), torch.zeros(6, dtype=torch.bool)
    walked = walk_windows(nodes, after, is_over, M)
    assert walked.canvas.tolist() == [[7, 8, 9, M, 9, M], [M, M, 9, M, 1, 1]]
    assert (walked.node.tolist(), walked.num_accepted.tolist()) == ([2, 0], [1, 0])
    invalid = walk_windows(make(torch.zeros(2, 2, dtype=torch.bool)), after, is_over, M)
    is_over[0] = True
    ended = walk_windows(nodes, after, is_over, M)
    for stays in (invalid, ended):
        assert (stays.canvas[0].tolist(), stays.num_accepted.tolist()) == ([7, 8, 9, M, M, M], [0, 0])


def chains(num_reqs: int, num_drafts: int, width: int, seed: int) -> tuple[Nodes, torch.Tensor]:
    """Return chains, and what steps make of their states: mostly a later draft, else any state."""
    rng = random.Random(seed)
    canvases = torch.full((num_reqs, 1 + num_drafts, width), M)
    for chain in canvases:
        for draft, place in enumerate(rng.sample(range(width - 1), num_drafts), start=1):
            chain[draft:, place] = rng.randrange(1, 3)
    after = canvases.clone()
    for chain, made in zip(canvases, after, strict=True):
        for node in range(num_drafts):
            if rng.random() < 0.1:
                continue
            if rng.random() < 0.8:
                made[node] = chain[min(node + rng.choice([1, 1, 2]), num_drafts)]
            else:
                open_places = (chain[node] == M).nonzero()[:, 0].tolist()
                made[node, rng.sample(open_places, rng.randint(1, 2))] = rng.randrange(1, 3)
        made[num_drafts, -1] = 1
    is_valid = torch.rand(num_reqs, num_drafts, generator=torch.Generator().manual_seed(seed)) < 0.9
    depth = torch.arange(1, 1 + num_drafts).expand(num_reqs, -1)
    return Nodes.of_roots(canvases[:, 0], M).with_drafts(canvases[:, 1:], is_valid, depth, M), after


@pytest.mark.parametrize("seed", range(5))
def test_a_walk_is_one_step_after_another(seed: int) -> None:
    """Until what a step makes is no draft, or one that is not valid, or ends the reply."""
    nodes, after = chains(num_reqs=40, num_drafts=6, width=9, seed=seed)
    is_over = torch.rand(after.shape[:2], generator=torch.Generator().manual_seed(seed)) < 0.1
    walked = walk_windows(nodes, after.flatten(0, 1), is_over.flatten(), M)
    lengths = set()
    for request, states in enumerate(nodes.canvas.tolist()):
        node, length = 0, 0
        while True:
            made = after[request, node].tolist()
            found = [k for k in range(node + 1, 7) if states[k] == made and nodes.is_valid[request, k]]
            if not found or is_over[request, node]:
                break
            node, length = found[0], length + 1
        lengths.add(length)
        assert (walked.node[request], walked.num_accepted[request]) == (node, length)
        assert walked.canvas[request].tolist() == made
    assert len(lengths) > 3


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.bytes = max(self.bytes, made.untyped_storage().nbytes())
        return made


def test_a_walk_takes_no_more_memory_than_its_states() -> None:
    """However many drafts there are."""
    nodes, after = chains(num_reqs=2, num_drafts=63, width=128, seed=0)
    with Largest() as largest:
        walk_windows(nodes, after.flatten(0, 1), torch.zeros(128, dtype=torch.bool), M)
    assert largest.bytes == nodes.canvas.nbytes
