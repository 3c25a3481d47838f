"""The readiness that is fitted to traces."""

import numpy as np
import pytest

from tests.calibrate.traces import MASK, make_block, make_trace, random_trace
from vllm_dllm.calibrate.fit import fit_readiness
from vllm_dllm.draft.readiness import Readiness


@pytest.mark.parametrize(("most_per_step", "per_step"), [(1, 1), (3, None)], ids=["one", "varying"])
def test_confident_positions_are_ready(most_per_step, per_step):
    rng = np.random.default_rng(1)
    traces = [random_trace(rng, prompt_idx=i, most_per_step=most_per_step) for i in range(20)]
    found = fit_readiness(traces, MASK, per_step)
    assert found.slope > 0.3
    assert (found.bias == 0.0) == (per_step == 1)


def test_new_neighbours_count_where_the_order_follows_them():
    text, confidence = list(range(50, 59)), [0.5] * 9  # only the neighbours tell
    beside, apart = (
        fit_readiness([make_trace(make_block(text, [[i] for i in order], confidence))] * 5, MASK, 1).near[0]
        for order in (range(9), (0, 3, 6, 1, 4, 7, 2, 5, 8))
    )
    assert beside > 1.0 > 0.0 > apart


def test_nothing_to_learn_from():
    block = make_block([50, 51], [[0, 1]], [0.5, 0.5])
    assert fit_readiness([make_trace(block)], MASK, None) == Readiness()
