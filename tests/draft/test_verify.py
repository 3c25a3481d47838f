"""The accept walk on canvases made by hand."""

import torch

from vllm_dllm.draft.verify import accept


def walk(canvas: list[int], following: list[int], is_valid: list[bool] | None = None) -> tuple[int, int]:
    """Walk with canvases of one token each."""
    valid = torch.tensor([[True] * len(canvas) if is_valid is None else is_valid])
    result = accept(torch.tensor(canvas)[None, :, None], torch.tensor(following)[None, :, None], valid)
    return int(result.node), int(result.num_accepted)


def test_nothing_comes_true() -> None:
    assert walk([1, 2, 3], [9, 3, 9]) == (0, 0)


def test_a_chain_is_followed_in_any_order_of_nodes() -> None:
    assert walk([1, 4, 2, 3], [2, 9, 3, 4]) == (1, 3)


def test_a_branch_ends_where_the_next_canvas_was_not_drafted() -> None:
    assert walk([1, 2, 3, 4], [3, 4, 8, 9]) == (2, 1)


def test_invalid_nodes_are_not_accepted() -> None:
    assert walk([1, 2, 3], [2, 3, 9], [True, False, True]) == (0, 0)


def test_a_finished_root_stays() -> None:
    assert walk([1, 2], [1, 2]) == (0, 0)


def test_equal_drafts_count_once() -> None:
    assert walk([1, 2, 2, 3], [2, 3, 3, 9]) == (3, 2)


def test_requests_walk_apart() -> None:
    canvas = torch.tensor([[[1], [2], [3]], [[1], [2], [3]]])
    following = torch.tensor([[[2], [3], [9]], [[3], [9], [9]]])
    result = accept(canvas, following, torch.ones(2, 3, dtype=torch.bool))
    assert (result.node.tolist(), result.num_accepted.tolist()) == ([2, 2], [2, 1])
