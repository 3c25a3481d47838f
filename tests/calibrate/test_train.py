"""Rankers that are trained on traces."""

import numpy as np
import pytest
import torch

from tests.calibrate.traces import MASK, make_block, make_trace, random_trace
from vllm_dllm.calibrate import train
from vllm_dllm.calibrate.build import make_graph, predict
from vllm_dllm.calibrate.count import Decoding
from vllm_dllm.calibrate.fit import fit_readiness
from vllm_dllm.calibrate.train import loss, make_examples, next_share, train_ranker
from vllm_dllm.config import DllmConfig

SETTINGS = DllmConfig(block_length=8, policy="static")


def ordered(count, seed):
    """Return traces whose order no confidence tells, nor which neighbours are new."""
    rng = np.random.default_rng(seed)
    order = [[position] for position in (3, 0, 6, 1, 7, 4, 2, 5)]
    return [
        make_trace(make_block(rng.integers(10, 200, 8).tolist(), order, rng.uniform(0.1, 0.9, 8)), prompt_idx=i)
        for i in range(count)
    ]


def test_a_ranker_learns_an_order_that_confidence_does_not_tell():
    used, held_out = ordered(60, 0), ordered(10, 1)
    examples, others = make_examples(used, MASK), make_examples(held_out, MASK)
    readiness, epochs = fit_readiness(used, MASK, 1), []
    before = torch.get_rng_state()
    ranker = train_ranker(examples, readiness, is_one_by_one=True, seed=0, on_epoch=lambda: epochs.append(1))
    assert torch.equal(torch.get_rng_state(), before)
    assert len(epochs) == train.EPOCHS
    without, found = next_share(others, readiness, None), next_share(others, readiness, ranker)
    assert found > 0.9 > 0.2 + without
    # A graph that is made with it saves more, by the code that drafts in the engine.
    first, second = (
        predict(make_graph(used, each, SETTINGS, 8), held_out, each, None, [3]).whole[3]
        for each in (Decoding(MASK), Decoding(MASK, ranker=ranker))
    )
    assert second.ratio > 1.2 * first.ratio


@pytest.mark.parametrize(("most_per_step", "per_step"), [(1, 1), (3, None)], ids=["one", "varying"])
def test_the_loss_of_a_new_ranker_is_that_of_the_readiness(most_per_step, per_step):
    rng = np.random.default_rng(2)
    traces = [random_trace(rng, prompt_idx=i, most_per_step=most_per_step) for i in range(8)]
    examples, readiness = make_examples(traces, MASK), fit_readiness(traces, MASK, per_step)
    assert examples.is_masked.shape[1] == 1 + train.STEPS_AHEAD
    plain = loss(examples, readiness, None, is_one_by_one=per_step == 1)
    new = loss(examples, readiness, train.OrderRanker().eval(), is_one_by_one=per_step == 1)
    torch.testing.assert_close(new, plain)
    trained = train_ranker(examples, readiness, is_one_by_one=per_step == 1, seed=0)
    assert loss(examples, readiness, trained, is_one_by_one=per_step == 1) < plain


def test_blocks_of_one_step_have_nothing_to_learn_from():
    assert make_examples([make_trace(make_block([50, 51], [[0, 1]], [0.5, 0.5]))], MASK) is None
