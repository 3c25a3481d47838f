"""What uneven numbers of drafts could gain: the deals keep the total, and the oracle bounds the others."""

import pytest

from benchmarks.budget.recorded import recordings
from benchmarks.budget.uneven import as_now, by_averages, by_oracle, evenly, greedy, transitions

KNOWN = recordings()


def test_greedy_takes_the_largest_marginal_gains() -> None:
    assert greedy([[0.0, 0.5, 0.6], [0.0, 0.4, 0.7]], 2) == [1, 1]
    assert greedy([[0.0, 0.5, 0.9], [0.0, 0.1, 0.2]], 2) == [2, 0]
    assert greedy([[0.0, 0.5], [0.0, 0.5]], 5) == [1, 1], "there are no more"


def test_what_the_host_knows_gains_little_over_what_is_served_and_the_oracle_most() -> None:
    names = ["LLaDA static", "!LLaDA static"]
    even, now, averages, oracle = (
        transitions(names, KNOWN, 4, 2, deal) for deal in (evenly, as_now, by_averages, by_oracle)
    )
    assert even < now == pytest.approx(averages, rel=0.02)
    assert averages < oracle
