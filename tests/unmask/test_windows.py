"""Windows that slide, with drafts: whose window lies where, and which states come true."""

import torch

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
    walked = walk_windows(nodes, after, is_over)
    assert walked.canvas.tolist() == [[7, 8, 9, M, 9, M], [M, M, 9, M, 1, 1]]
    assert (walked.node.tolist(), walked.num_accepted.tolist()) == ([2, 0], [1, 0])
    invalid = walk_windows(make(torch.zeros(2, 2, dtype=torch.bool)), after, is_over)
    is_over[0] = True
    ended = walk_windows(nodes, after, is_over)
    for stays in (invalid, ended):
        assert (stays.canvas[0].tolist(), stays.num_accepted.tolist()) == ([7, 8, 9, M, M, M], [0, 0])
