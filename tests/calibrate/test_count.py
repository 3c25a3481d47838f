"""Formulas of true future states, on traces with known answers."""

import numpy as np
import pytest

from tests.calibrate.traces import MASK, make_block, make_trace
from vllm_dllm.calibrate.count import MAX_PAIRS, Decoding, anchor_paths, block_paths
from vllm_dllm.calibrate.select import count_formulas
from vllm_dllm.draft.readiness import Readiness

TEXT = [50, 51, 52, 53]


def paths(block, **decoding):
    return block_paths(block, 0, Decoding(MASK, **decoding))


def test_order_of_confidence_is_a_chain():
    block = make_block(TEXT, [[2], [0], [3], [1]], [0.8, 0.2, 0.9, 0.5])
    # The root of anchor 0 has masks at 0, 3, 1 in this order; a draft of the finished canvas is worth nothing.
    assert paths(block) == [(((0, 0),), ((0, 0), (1, 0))), (((0, 0),),), ()]


def test_two_orders_of_the_same_positions_meet():
    first = make_block(TEXT, [[2], [0], [3], [1]], [0.8, 0.2, 0.9, 0.5])
    second = make_block(TEXT, [[2], [3], [0], [1]], [0.8, 0.2, 0.9, 0.5])
    counts = count_formulas(anchor_paths([make_trace(first, second)], Decoding(MASK)))
    assert counts == {((0, 0),): 3, ((1, 0),): 1, ((0, 0), (1, 0)): 2}


def test_several_positions_of_a_step_are_one_formula():
    block = make_block(TEXT, [[2], [3, 0], [1]], [0.8, 0.2, 0.9, 0.5])
    assert paths(block) == [(((0, 0), (1, 0)),), ()]


def test_vocab_rank_of_a_second_candidate():
    block = make_block(TEXT, [[2], [0], [3], [1]], [0.8, 0.2, 0.9, 0.5], wrong=[0])
    assert paths(block)[0] == (((0, 1),), ((0, 1), (1, 0)))


def test_a_token_outside_the_candidates_ends_the_path():
    block = make_block(TEXT, [[2], [0], [3], [1]], [0.8, 0.2, 0.9, 0.5], wrong={3: None})
    assert paths(block) == [(((0, 0),),), (), ()]


def test_equal_confidences_are_ordered_by_position():
    block = make_block(TEXT, [[0], [2], [1], [3]], [0.5, 0.5, 0.5, 0.5])
    assert paths(block)[0] == (((1, 0),), ((0, 0), (1, 0)))


def test_readiness_ranks_a_new_neighbour_first():
    block = make_block(TEXT, [[2], [1], [0], [3]], [0.8, 0.5, 0.9, 0.6])
    assert paths(block)[0][0] == ((2, 0),)
    ready = Readiness(near=(5.0, 0.0))  # positions 1 and 3 are beside position 2
    assert paths(block, readiness=ready)[0][0] == ((1, 0),)


def test_long_formulas_are_not_counted():
    length = MAX_PAIRS + 4
    block = make_block(list(range(50, 50 + length)), [[i] for i in range(length)], np.linspace(0.9, 0.1, length))
    assert max(len(formula) for path in paths(block) for formula in path) == MAX_PAIRS


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_random_policy_knows_its_order(seed):
    """Positions that the noise will choose have rank 0 at their step, so the formulas are prefixes."""
    import torch

    from vllm_dllm import noise

    masked, steps, start = [0, 1, 2, 3], [], 10
    while masked:
        keys = noise.stream_keys(
            torch.tensor(seed), torch.tensor([start + p for p in masked]), torch.tensor(len(masked))
        )
        position = masked[int(noise.uniform(keys, torch.tensor(noise.STREAM)).argmax())]
        steps.append([position])
        masked.remove(position)
    block = make_block(TEXT, steps, [0.8, 0.2, 0.9, 0.5], start=start)
    found = block_paths(block, seed, Decoding(MASK, is_random=True))
    assert [[len(formula) for formula in path] for path in found] == [[1, 2], [1], []]
    # A pair's rank counts what is masked in the root, ordered by the step's own noise.
    assert all(path[0] == ((0, 0),) for path in found if path)
