"""LLaDA2.2's rule, canvas by canvas: what is written, how tokens move, and how a block ends."""

from collections.abc import Sequence

import pytest
import torch

from vllm_dllm.reference.indel_rule import Indel
from vllm_dllm.reference.rules import Canvas, Look

MASK, DELETE, SPLIT = 3, 8, 9


def look(*likeliest: tuple[int, float]) -> Look:
    """A position with these logits, of a vocabulary of 13 whose other ones are -9 and less."""
    logits = -9.0 - torch.arange(13.0)
    for token, logit in likeliest:
        logits[token] = logit
    return Look.of(logits, MASK)


def looks(*tokens: int) -> list[Look]:
    return [look((token, 9.0)) for token in tokens]


def rule(**changes: object) -> Indel:
    return Indel(**{"threshold": 0.9, "delete": DELETE, "split": SPLIT, **changes})


def steps(its: Indel, canvas: Canvas, *of_steps: Sequence[Look]) -> list[Canvas]:
    found = []
    for own in of_steps:
        assert its.goes_on
        canvas = its.step(canvas, own)
        found.append(canvas)
    return found


def test_masks_above_the_threshold_are_written_or_the_surest() -> None:
    its = rule()
    unsure = [look((5, 0.2 * i), (6, 0.0)) for i in range(4)]
    assert steps(its, [None] * 4, [*unsure[:2], *looks(7, 7)], [*unsure[:2], *looks(7, 7)]) == [
        [None, None, 7, 7],
        [None, 5, 7, 7],
    ]
    assert steps(rule(threshold=0.1), [None] * 4, unsure) == [[5, 5, 5, 5]]


def test_an_original_mask_takes_the_next_token_in_place_of_the_mask() -> None:
    assert steps(rule(), [None] * 2, [look((MASK, 9.0), (5, 1.0)), look((6, 4.0))]) == [[None, 6]]
    assert steps(rule(threshold=0.0), [None] * 2, [look((MASK, 9.0), (5, 1.0)), look((6, 4.0))]) == [[5, 6]]


def test_tokens_move_and_masks_that_come_in_are_not_original() -> None:
    """Behind a deletion a mask comes in at the end; a split puts one before the token, and pushes one out."""
    its = rule(threshold=0.0)
    assert steps(its, [None] * 4, looks(4, 5, 6, 7), looks(4, DELETE, 6, 7)) == [[4, 5, 6, 7], [4, 6, 7, None]]
    assert its.is_original == [True, True, True, False]
    assert steps(its, [4, 6, 7, None], looks(4, SPLIT, 7, 5)) == [[4, None, 6, 7]]
    assert its.is_original == [True, False, True, True]
    # No original mask is left, so that all are written; the mask token stands for itself there.
    assert steps(its, [4, None, 6, 7], looks(4, MASK, 6, 7)) == [[4, None, 6, 7]]
    assert steps(its, [4, None, 6, 7], looks(4, 10, 6, 7), looks(4, 10, 6, 7))[-1] == [4, 10, 6, 7]
    assert not its.goes_on


def test_inserted_masks_raise_how_many_are_written() -> None:
    its = rule(threshold=0.9)
    its.num_updates, its.is_original, its.written = 1, [True, True, False, False], [set() for _ in range(4)]
    unsure = [look((5, 0.1 * i), (6, 0.0)) for i in range(3)]
    assert its.step([None, None, None, None], [*unsure, *looks(7)]) == [None, 5, 5, 7]


def test_a_masked_position_may_split_and_a_written_one_be_masked_again() -> None:
    its = rule(threshold=0.0)
    assert steps(its, [None] * 3, looks(SPLIT, 5, 6)) == [[None, None, 5]]
    assert its.is_original == [False, True, True]
    assert steps(its, [None, None, 5], looks(4, 5, MASK)) == [[4, 5, None]]
    assert its.is_original[2]


def test_the_prompt_is_left_alone() -> None:
    its = rule(threshold=0.0, num_known=2)
    assert steps(its, [DELETE, 4, None, None], looks(5, 5, 6, SPLIT)) == [[DELETE, 4, 6, None]]


def test_a_canvas_that_comes_again_takes_another_way() -> None:
    """Two tokens that replace each other: at the second visit the least sure change is one never written there."""
    its = rule(threshold=0.0, edit_threshold=0.0)
    to_5 = [look((5, 2.0), (7, 1.0)), *looks(6)]
    to_7 = [look((7, 2.0), (10, 1.5), (5, 1.0)), *looks(6)]
    found = steps(its, [None, None], to_5, to_7, to_5, to_7)
    assert found == [[5, 6], [7, 6], [5, 6], [10, 6]]


@pytest.mark.parametrize("post_steps", [1, 3])
def test_the_last_step_writes_everything_and_nothing_that_moves(post_steps: int) -> None:
    its = rule(threshold=0.0, post_steps=post_steps)
    deletes = [*looks(4), look((DELETE, 9.0), (SPLIT, 8.0), (MASK, 7.0), (11, 1.0))]
    found = steps(its, [None] * 2, looks(4, 5), *[deletes] * post_steps)
    assert found[-1] == [4, 11]
    assert not its.goes_on
    assert found[1:-1] == [[4, None]] * (post_steps - 1)


def test_without_post_steps_the_step_that_writes_the_last_original_masks_is_the_last() -> None:
    its = rule(threshold=0.9, post_steps=0)
    assert steps(its, [None] * 2, [look((5, 0.1), (6, 0.0)), look((SPLIT, 9.0), (7, 1.0))]) == [[None, None]]
    its = rule(threshold=0.0, post_steps=0)
    assert steps(its, [None] * 2, looks(5, SPLIT)) == [[5, 0]]
    assert not its.goes_on


def test_a_block_ends_however_long_it_is_masked_again() -> None:
    its = rule(threshold=0.5, post_steps=2)
    canvas: Canvas = [None] * 4
    again = [look((5, 9.0)), *([look((MASK, 9.0), (6, 8.9))] * 3)]
    number = 0
    while its.goes_on:
        canvas = its.step(canvas, again)
        number += 1
    assert number <= 4 + 2 + 1
    assert None not in canvas
