"""Preemptions and an abort amid other requests."""

from collections.abc import Callable
from typing import Any

from tests.e2e.rig import Case, step_all


def check_interference(
    llm: Any, cases: list[Case], tokens_of: Callable[[Case], list[int]], preempts: Callable[[int], bool]
) -> None:
    """Abort the second of some requests, and preempt all under way before some steps; the others' tokens stay theirs.

    Args:
        llm: runs them.
        cases: the requests.
        tokens_of: what each has to come to.
        preempts: says before the steps of which numbers.
    """
    preempted = []

    def interfere(number: int, llm: Any) -> None:
        if preempts(number):
            preempted.append(len(llm.llm_engine.engine_core.engine_core.scheduler.running))
            assert llm.llm_engine.reset_prefix_cache(reset_running_requests=True)
        if number == 3:
            llm.llm_engine.abort_request(["1"])

    tokens = step_all(llm, cases, interfere)
    assert sum(preempted) >= 4, "too few were preempted"
    expected = {str(i): tokens_of(case) for i, case in enumerate(cases) if i != 1}
    assert {name: own for name, own in tokens.items() if name != "1"} == expected
