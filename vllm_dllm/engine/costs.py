"""What a step costs by its number of rows, measured once when a worker starts, for the rule that chooses budgets."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group
from vllm.logger import init_logger

from vllm_dllm.draft.budget import CostCurve
from vllm_dllm.engine.configs import settings_of, spiffy_of

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


@dataclass(frozen=True, slots=True)
class StepShape:
    """A step to measure."""

    rows: int  # of the forward, with those that pad it to the captured graph
    num_reqs: int
    num_canvases: int  # of each request
    is_captured: bool


def step_shapes(captured: Sequence[int], block_length: int, max_num_reqs: int, max_budget: int) -> Iterator[StepShape]:
    """Yield the steps to measure: each captured graph, since none costs much, and what is larger than all of them.

    Args:
        captured: rows of the captured graphs, ascending.
        block_length: rows of a canvas.
        max_num_reqs, max_budget: as in `cost_points`.
    """
    for rows in captured:
        num_blocks = rows // block_length
        num_reqs = min(-(-num_blocks // (1 + max_budget)), max_num_reqs)
        yield StepShape(rows, num_reqs, num_blocks // num_reqs, is_captured=True)
    for num_reqs, num_canvases in cost_points(max_num_reqs, max_budget):
        rows = num_reqs * num_canvases * block_length
        if rows > max(captured, default=0):
            yield StepShape(rows, num_reqs, num_canvases, is_captured=False)


def measure_curve(
    vllm_config: VllmConfig, measure: Callable[[StepShape], float], captured: Sequence[int] = ()
) -> CostCurve | None:
    """Measure the steps of `step_shapes` that fit the token budget; None where the budget is not chosen by them.

    All ranks measure together, and the slowest counts.

    Args:
        vllm_config: of the engine.
        measure: return the milliseconds of a step.
        captured: as in `step_shapes`.
    """
    spiffy, scheduler = spiffy_of(vllm_config), vllm_config.scheduler_config
    if spiffy is None or spiffy.budget is not None or spiffy.max_nodes == 0:
        return None
    block_length = settings_of(vllm_config).block_length
    points: list[tuple[int, float]] = []
    for shape in step_shapes(captured, block_length, scheduler.max_num_seqs, spiffy.max_nodes):
        is_slow = len(points) > 1 and points[-1][1] > SLOW_MS  # one point alone would be a flat curve
        if points and (shape.rows > scheduler.max_num_batched_tokens or is_slow):
            break
        points.append((shape.rows, slowest_rank(measure(shape))))
    if get_tp_group().is_first_rank:
        steps = ", ".join(f"{rows} rows {ms:.1f}" for rows, ms in points)
        way = f", the first {len(captured)} of captured graphs" if captured else ""
        logger.info("Draft budgets start from these times of a step in ms%s: %s", way, steps)
    return CostCurve(tuple(points), min(len(captured), len(points)))


def slowest_rank(ms: float) -> float:
    """Return the largest of all ranks' values: each goes on by it, so that none waits for a step another leaves out."""
    group = get_tp_group()
    if group.world_size == 1:
        return ms
    value = torch.tensor(ms, dtype=torch.float64)
    torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MAX, group=group.cpu_group)
    return value.item()
