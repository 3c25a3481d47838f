"""Requests whose sequences grow by blocks, beside others that have all their masks from the beginning."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.e2e.rig import Case, Oracle, preempt_at_times, run_outputs, step_all


def growing(cases: list[Case]) -> list[Case]:
    """Let three of four cases grow, of lengths that give them something to grow to."""
    horizons = (1, 2, None, 3)
    return [
        dataclasses.replace(case, horizon=horizons[i % 4], max_tokens=max(case.max_tokens, 37), steps=None)
        for i, case in enumerate(cases)
    ]


def check_growing(llm: Any, oracle: Oracle, cases: list[Case], settings: dict[str, Any]) -> None:
    """Compare tokens and forwards without drafts, also of requests that are preempted as they grow."""
    cases = growing(cases)
    with preemptions(llm) as preempted:
        outputs = run_outputs(llm, cases)
    expected = [oracle.tokens(case, settings) for case in cases]
    assert [list(output.outputs[0].token_ids) for output in outputs] == expected
    took = [output.kv_transfer_params["dllm"] for output in outputs]
    for case, output, numbers in zip(cases, outputs, took, strict=True):
        if not numbers["accepted"] and output.request_id not in preempted:
            assert numbers["nfe"] == oracle.generation(case, settings).nfe
    whole = [oracle.tokens(dataclasses.replace(case, horizon=None), settings) for case in cases]
    assert expected != whole, "growing says nothing here"
    assert step_all(llm, cases[:6], preempt_at_times) == {str(i): tokens for i, tokens in enumerate(expected[:6])}


@contextmanager
def preemptions(llm: Any) -> Iterator[list[str]]:
    """Watch whom the scheduler preempts meanwhile, by the ids of users."""
    scheduler, names = llm.llm_engine.engine_core.engine_core.scheduler, []
    preempt = scheduler._preempt_request

    def watched(request: Any, *args: Any, **kwargs: Any) -> None:
        names.append(request.request_id.split("-")[0])
        preempt(request, *args, **kwargs)

    scheduler._preempt_request = watched
    try:
        yield names
    finally:
        del scheduler._preempt_request
