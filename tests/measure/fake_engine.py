"""An engine for tests of `bench decode`: it decodes nothing and says that it did."""

from collections import defaultdict
from typing import Self

import pytest

from vllm_dllm.engine.telemetry import StepStats
from vllm_dllm.measure import decode
from vllm_dllm.measure.workload import EngineSpec, Measurement, Workload
from vllm_dllm.state.report import MAX_DEPTH

WORKLOAD = Workload("model", prompts=((5, 6), (7,)), gen_length=4, block_length=2, concurrency=(1, 2))

ROWS = 5
"""Of a step without drafts; a draft has one."""


class FakeEngine:
    """Takes a second without drafts and half of that with; `calls` is shared by all engines of a test."""

    calls: list[tuple[str, int, int | None, int | None]]
    wrong_budget: int | None

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        config = spec.speculative_config
        self.kind = "off" if config is None else f"{config['budget']}"
        self.is_open = True

    def measure(
        self, concurrency: int, budget: int | None = None, num_prompts: int | None = None, first: int = 0
    ) -> Measurement:
        assert self.is_open
        self.calls.append((self.kind, concurrency, budget, num_prompts))
        is_wrong = budget is not None and budget == self.wrong_budget
        tokens = [[1, 2, 3, 4], [1, 2, 3, 9 if is_wrong else 4]][first:][:num_prompts]
        num_steps, accepted = (8, 0) if self.kind == "off" else (4, 4)
        drafts = 0 if self.kind == "off" else budget or 2
        stats = StepStats(
            budgets={drafts: num_steps},
            forwards=num_steps,
            refreshes=4,
            rows=num_steps * ROWS,
            proposed=[drafts * num_steps, *[0] * (MAX_DEPTH - 1)],
            accepted=[accepted, *[0] * (MAX_DEPTH - 1)],
        )
        steps = defaultdict(list, {(concurrency, drafts): [(ROWS + drafts, 2.0)] * 9 + [(100, 3.0)]})
        seconds = 1.0 if self.kind == "off" else 0.5
        return Measurement(tokens, seconds, 2 * seconds, stats, steps)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.is_open = False


def install(monkeypatch: pytest.MonkeyPatch, wrong_budget: int | None = None) -> type[FakeEngine]:
    """Let `bench decode` start fake engines; those given `wrong_budget` decode something else."""
    monkeypatch.setattr(FakeEngine, "calls", [], raising=False)
    monkeypatch.setattr(FakeEngine, "wrong_budget", wrong_budget, raising=False)
    monkeypatch.setattr(decode, "EngineProcess", FakeEngine)
    return FakeEngine
