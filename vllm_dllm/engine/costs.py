"""What a step costs by its number of rows, measured once at start for the rule that chooses budgets."""

from collections.abc import Callable, Iterator
from typing import Any

from vllm.logger import init_logger
from vllm.v1.engine.core import EngineCore

from vllm_dllm.draft.budget import CostCurve
from vllm_dllm.engine import compat

logger = init_logger("vllm.dllm")

SLOW_MS = 500.0
"""No larger step is measured after one that took so long; the curve goes on as a line."""


def cost_points(max_num_reqs: int, max_budget: int) -> Iterator[tuple[int, int]]:
    """Yield the steps to measure, as (number of requests, canvases of each), by ascending number of rows.

    One request with a budget of 0, 1, 2, 4, ... `max_budget`, then 4, 16, ... `max_num_reqs` requests with that.
    """
    yield 1, 1
    budget = 1
    while budget < max_budget:
        yield 1, 1 + budget
        budget *= 2
    num_reqs = 1
    while num_reqs < max_num_reqs:
        yield num_reqs, 1 + max_budget
        num_reqs *= 4
    yield max_num_reqs, 1 + max_budget


def measure_point(worker: Any, point: tuple[int, int]) -> float:
    """Run in a worker: return the milliseconds of a step with synthetic canvases."""
    ms: float = worker.model_runner.model_state.measure_cost(*point)
    return ms


def measure_curve(engine: EngineCore) -> CostCurve:
    """Measure the steps of `cost_points` that fit the token budget, on all ranks at once; the slowest rank counts."""
    scheduler = engine.scheduler
    points: list[tuple[int, float]] = []
    for num_reqs, num_canvases in cost_points(scheduler.max_num_running_reqs, scheduler.max_budget):
        rows = num_reqs * num_canvases * scheduler.block_length
        is_slow = len(points) > 1 and points[-1][1] > SLOW_MS  # one point alone would be a flat curve
        if points and (rows > scheduler.max_num_scheduled_tokens or is_slow):
            break
        points.append((rows, max(engine.collective_rpc(measure_point, args=((num_reqs, num_canvases),)))))
    return CostCurve(tuple(points))


def measure_at_start() -> None:
    """Give the scheduler its cost curve as soon as an engine has one, before the first request.

    Called by the scheduler itself, so that no other model's process imports or wraps anything for it. The method that
    is wrapped is the first that the engine calls on itself when it has both workers and scheduler.
    """

    def make(original: Callable[[EngineCore], None]) -> Callable[[EngineCore], None]:
        def wrapper(self: EngineCore) -> None:
            original(self)
            scheduler = getattr(self, "scheduler", None)
            if scheduler is not None and getattr(scheduler, "wants_cost_curve", False):
                curve = measure_curve(self)
                scheduler.rule.curve = curve
                steps = ", ".join(f"{rows} rows {ms:.1f}" for rows, ms in curve.points)
                logger.info("Draft budgets start from these times of a step in ms: %s", steps)

        return wrapper

    compat.wrap(EngineCore, "_initialize_effective_attention_block_size", ("self",), make)
