"""Are the probabilities true that drafts are chosen by? On traces that `vllm-dllm calibrate --keep-traces` left.

    python -m benchmarks.ablations.reach graph.json.traces --held-out 0.4

Calibrates on a part of the prompts; on the others, how often drafts came true beside the probability of being reached
that they were chosen by (`draft.prune`, with the graph's correction), whether another power of it would choose better
ones, and what it would gain to deal out a batch's drafts by it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain, pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.ablations.drafting import BUDGETS, Material, print_report
from benchmarks.budget.recorded import MAX_DRAFTS, Recording, needed
from benchmarks.budget.uneven import DEALS, Deal, Served, greedy, transitions
from vllm_dllm.calibrate.simulate import BlockDrafts, count_forwards, draft_blocks
from vllm_dllm.draft.calibrated import GraphDrafter
from vllm_dllm.draft.compile import compile_graph
from vllm_dllm.draft.graph import DraftGraph

GRAPH_NODES = 32
EDGES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
"""Between which probabilities drafts are counted together."""
POWERS = (0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0)
AT_ONCE, DEALT, NUM_STEPS = 8, (1, 2, 4), 2000
_LEAST = 1e-6
"""Probabilities are taken to be at least so far from 0 and 1 where their odds are needed."""


@dataclass(frozen=True, slots=True)
class Said:
    """Some drafts: the probability that each would come true, and whether it did; [num_drafts] both."""

    probability: NDArray[np.float64]
    came_true: NDArray[np.bool_]


def said(graph: DraftGraph, blocks: Sequence[BlockDrafts], budget: int) -> Said:
    """Return the best drafts of every anchor."""
    found = [
        (np.exp(scores(graph, block))[:, :budget][is_valid], (block.ahead > 0)[:, :budget][is_valid])
        for block in blocks
        for is_valid in [block.is_valid[:, :budget]]
    ]
    probability, came_true = (np.concatenate(each) for each in zip(*found, strict=True))
    return Said(np.minimum(probability, 1.0), came_true)


def scores(graph: DraftGraph, block: BlockDrafts) -> NDArray[np.float64]:
    """Return the corrected log probability of being reached of a block's drafts; [num_anchors, num_nodes]."""
    scores: NDArray[np.float64] = block.log_reach + np.array(graph.log_corrections)[block.node - 1]
    return scores


def error(drafts: Said) -> float:
    """Return how far what was said is from what came true, between two edges, on the average of the drafts."""
    return sum(abs(mean - share) * number for _, number, mean, share in bins(drafts)) / len(drafts.probability)


def bins(drafts: Said) -> Iterator[tuple[str, int, float, float]]:
    """Yield of the drafts between two edges the edges, their number, the mean of what was said, and what came true."""
    for low, high in pairwise(EDGES):
        is_in = (drafts.probability > low) & (drafts.probability <= high)
        if is_in.any():
            yield (
                f"{low:g} to {high:g}",
                int(is_in.sum()),
                float(drafts.probability[is_in].mean()),
                float(drafts.came_true[is_in].mean()),
            )


def fit(drafts: Said) -> tuple[float, float]:
    """Return a and b of the likeliest log-odds a * logit(said) + b."""
    log_odds = torch.from_numpy(drafts.probability.clip(_LEAST, 1 - _LEAST)).logit()
    is_true = torch.from_numpy(drafts.came_true).double()
    weights = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.binary_cross_entropy_with_logits(weights[0] * log_odds + weights[1], is_true)
        value.backward()
        return value

    optimizer.step(loss)
    slope, bias = weights.tolist()
    return slope, bias


def fitted(drafts: Said, slope: float, bias: float) -> Said:
    """Return the same drafts with what the fit would have said of them."""
    clipped = drafts.probability.clip(_LEAST, 1 - _LEAST)
    odds = np.exp(bias) * (clipped / (1 - clipped)) ** slope
    return replace(drafts, probability=odds / (1 + odds))


def to_the_power(graph: DraftGraph, used: Sequence[BlockDrafts], power: float) -> DraftGraph:
    """Return the graph with the correction that probabilities to a power need."""
    total = np.zeros(1 + len(graph))
    for block in used:
        np.add.at(total, block.node, np.exp(power * block.log_reach))
    return replace(graph, expected=tuple(total[1:].tolist()))


def reordered(graph: DraftGraph, is_on_way: NDArray[np.bool_], block: BlockDrafts, power: float) -> BlockDrafts:
    """Return all drafts of a block, best first by a power of what they had, each behind its chain of first parents.

    Args:
        graph: with the correction for the power.
        is_on_way: [num_nodes, num_nodes], see `CompiledGraph`.
        block: all nodes of its anchors.
        power: of the probabilities.
    """
    by_node = block.node.argsort(1)
    powered = replace(block, log_reach=power * block.log_reach)
    score = np.take_along_axis(scores(graph, powered), by_node, 1)
    worst = np.where(is_on_way, score[:, None], np.inf).min(2)
    worst[~np.take_along_axis(block.is_valid, by_node, 1)] = -np.inf
    order = np.take_along_axis(by_node, (-worst).argsort(1, kind="stable"), 1)
    arrays = (getattr(powered, field.name) for field in fields(block) if field.name != "num_steps")
    return BlockDrafts(block.num_steps, *(np.take_along_axis(array, order, 1) for array in arrays))


def chances(graph: DraftGraph, block: BlockDrafts) -> list[list[float]]:
    """Return of each anchor how many transitions its best 0, 1, ... drafts are expected to save."""
    worst = np.minimum.accumulate(scores(graph, block), 1)[:, :MAX_DRAFTS]
    gains = np.where(block.is_valid[:, :MAX_DRAFTS], np.exp(np.minimum(worst, 0.0)), 0.0)
    return [[0.0, *row] for row in gains.cumsum(1).tolist()]


def deals(
    material: Material, graph: DraftGraph, by_prompt: Sequence[Sequence[BlockDrafts]]
) -> Iterator[tuple[int, list[float]]]:
    """Yield a number of drafts and the transitions of a step: even, then those of all deals over it.

    To the deals of `budget.uneven` comes one by the probabilities of the present step's own drafts.

    Args:
        material: of the traces.
        graph: of the drafts.
        by_prompt: of each prompt its blocks' drafts.
    """
    prompts = tuple(tuple(map(needed, blocks)) for blocks in by_prompt)
    prior = tuple(GraphDrafter(graph).prior()[: MAX_DRAFTS + 1])
    known = {"": Recording(material.settings.block_length, material.settings.is_block_causal, prior, prompts)}
    own = {
        id(prompt): [chances(graph, block) for block in blocks]
        for prompt, blocks in zip(prompts, by_prompt, strict=True)
    }

    def by_probabilities(drafting: Sequence[Served], total: int) -> list[int]:
        requests = [served.request for served in drafting]
        return greedy([own[id(request.blocks)][request.block][request.anchor] for request in requests], total)

    all_deals: dict[str, Deal] = {**DEALS, "by probabilities": by_probabilities}
    for budget in DEALT:
        even, *others = (transitions([""], known, AT_ONCE, budget, deal, NUM_STEPS) for deal in all_deals.values())
        yield budget, [even, *(other / even for other in others)]


def report(material: Material) -> Iterator[str]:
    """Yield the lines of three tables and of what follows the first."""
    graph = material.graph(GRAPH_NODES)
    by_prompt = [draft_blocks(graph, [trace], material.decoding) for trace in material.held_out]
    used, held_out = draft_blocks(graph, material.used, material.decoding), list(chain.from_iterable(by_prompt))
    drafts = said(graph, held_out, MAX_DRAFTS)
    slope, bias = fit(said(graph, used, MAX_DRAFTS))
    yield "| said | drafts | mean | came true |\n|---|---|---|---|"
    yield from (f"| {name} | {number} | {mean:.3f} | {share:.3f} |" for name, number, mean, share in bins(drafts))
    mean, share = drafts.probability.mean(), drafts.came_true.mean()
    yield f"| all | {len(drafts.probability)} | {mean:.3f} | {share:.3f} |\n"
    better = error(fitted(drafts, slope, bias))
    yield f"Error: {error(drafts):.4f}; with log-odds * {slope:.3f} {bias:+.3f}: {better:.4f}."
    yield ""
    yield (
        "| power | " + " | ".join(f"budget {budget}" for budget in BUDGETS) + " |\n" + "|---" * (1 + len(BUDGETS)) + "|"
    )
    by_power = {power: _forwards(to_the_power(graph, used, power), held_out, power) for power in POWERS}
    for power, counts in by_power.items():
        ratios = (as_served / count for as_served, count in zip(by_power[1.0], counts, strict=True))
        yield f"| {power:g} | " + " | ".join(f"{ratio:.3f}" for ratio in ratios) + " |"
    yield ""
    yield "| drafts of each | " + " | ".join([*DEALS, "by probabilities"]) + " |\n" + "|---" * (2 + len(DEALS)) + "|"
    for budget, values in deals(material, graph, by_prompt):
        yield f"| {budget} | " + " | ".join(f"{value:.3f}" for value in values) + " |"


def _forwards(graph: DraftGraph, blocks: Sequence[BlockDrafts], power: float) -> list[int]:
    """Return by budget the forwards that are no refresh."""
    is_on_way = compile_graph(graph, torch.device("cpu")).is_on_way.numpy()
    ordered = [reordered(graph, is_on_way, block, power) for block in blocks]
    found = [count_forwards(ordered, budget) for budget in BUDGETS]
    return [forwards.with_drafts - forwards.refreshes for forwards in found]


if __name__ == "__main__":
    print_report(report, __doc__)
