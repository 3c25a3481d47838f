"""Requests whose answers end in the middle of blocks: the published decoders go on there, the engine does not."""

import dataclasses
import random
from typing import Any

from tests.e2e.rig import Case, Oracle, preempt_at_times, run_outputs, step_all
from vllm_dllm.engine.configs import spiffy_of


def ending(oracle: Oracle, cases: list[Case], settings: dict[str, Any], seed: int) -> list[Case]:
    """Let each case but every fourth one stop at tokens of which one is in what the published decoder makes of it."""
    rng = random.Random(seed)
    ended = []
    for i, case in enumerate(cases):
        answer = oracle.published(case, settings).tokens.tolist()[: case.max_tokens]
        ids = (answer[rng.randrange(len(answer))], *rng.sample(range(4, 300), i % 5))
        ended.append(case if i % 4 == 3 else dataclasses.replace(case, stop_ids=ids))
    return ended


def check_forwards(oracle: Oracle, cases: list[Case], settings: dict[str, Any], took: list[dict[str, Any]]) -> None:
    """Compare forwards of requests with the reference's: drafts that came true count, also behind an answer's end."""
    for case, numbers in zip(cases, took, strict=True):
        least = oracle.generation(case, settings).nfe
        most = oracle.published(case, settings).nfe if numbers["accepted"] else least
        assert numbers["nfe"] <= least <= numbers["nfe"] + numbers["accepted"] <= most, case


def check_ended(llm: Any, oracle: Oracle, cases: list[Case], settings: dict[str, Any]) -> None:
    """Compare tokens with the published decoder's up to their end, and forwards with those that it needs.

    Args:
        llm: runs them.
        oracle: the reference decoder.
        cases: the requests; they get stop tokens.
        settings: of the server.
    """
    cases = ending(oracle, cases, settings, seed=len(cases[0].prompt))
    outputs = run_outputs(llm, cases)
    published = [oracle.published(case, settings) for case in cases]
    expected = [case.ends.cut(made.tokens.tolist()) for case, made in zip(cases, published, strict=True)]
    assert [list(output.outputs[0].token_ids) for output in outputs] == expected
    stopped = [tokens[-1] in case.stop_ids for case, tokens in zip(cases, expected, strict=True)]
    assert [output.outputs[0].finish_reason == "stop" for output in outputs] == stopped
    took = [output.kv_transfer_params["dllm"] for output in outputs]
    check_forwards(oracle, cases, settings, took)
    spiffy = spiffy_of(llm.llm_engine.vllm_config)
    if spiffy is not None and spiffy.budget is not None:  # "auto" may find that drafts do not pay
        assert sum(n["accepted"] for n in took) > 0, "no draft comes true"
    if spiffy is None:
        assert sum(n["nfe"] for n in took) < 0.9 * sum(made.nfe for made in published), "too few forwards are spared"
    preempted = step_all(llm, cases[:6], preempt_at_times)
    assert preempted == {str(i): tokens for i, tokens in enumerate(expected[:6])}
