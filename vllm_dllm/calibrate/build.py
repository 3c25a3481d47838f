"""From traces to a draft graph, and what it is worth on prompts that it has not seen."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from vllm_dllm.calibrate.count import Decoding, anchor_paths
from vllm_dllm.calibrate.fit import fit_readiness
from vllm_dllm.calibrate.select import Objective, count_formulas, select
from vllm_dllm.calibrate.simulate import Forwards, count_forwards, draft_blocks, expected_counts, until_eos
from vllm_dllm.calibrate.tokens import fit_token_weights
from vllm_dllm.calibrate.trace import PromptTrace
from vllm_dllm.config import DllmConfig
from vllm_dllm.draft.graph import DraftGraph
from vllm_dllm.errors import ConfigError
from vllm_dllm.unmask.policy import SCHEDULED
from vllm_dllm.unmask.schedule import UnmaskRules, count_table


@dataclass(frozen=True, slots=True)
class Prediction:
    """Forwards by budget: of whole generations, and of their blocks up to the end of the text."""

    whole: Mapping[int, Forwards]
    until_eos: Mapping[int, Forwards]
    num_prompts: int


def tokens_per_step(settings: DllmConfig, rules: UnmaskRules) -> int | None:
    """Return how many positions each step of the policy unmasks but a block's last, None when that varies."""
    if settings.policy not in SCHEDULED:
        return None
    counts = count_table(rules, settings.block_length, settings.steps_per_block or settings.block_length)
    found = set(counts[: -counts[-1]]) or {counts[-1]}
    return found.pop() if len(found) == 1 else None


def split(num_prompts: int, held_out: float, seed: int) -> tuple[list[int], list[int]]:
    """Divide prompts at random into those to calibrate with and those to measure with; at least one of each."""
    indices = list(range(num_prompts))
    random.Random(seed).shuffle(indices)
    num_held_out = min(max(1, round(held_out * num_prompts)), num_prompts - 1)
    return sorted(indices[num_held_out:]), sorted(indices[:num_held_out])


def make_graph(
    traces: Sequence[PromptTrace],
    decoding: Decoding,
    settings: DllmConfig,
    num_nodes: int,
    objective: Objective = "gain",
) -> DraftGraph:
    """Fit, count and choose.

    Args:
        traces: to calibrate with.
        decoding: how the prompts were decoded; its readiness is not used.
        settings: of the engine that decoded them.
        num_nodes: at most so many; fewer where the traces show no more.
        objective: what nodes are chosen by.

    Raises: ConfigError when no step of the traces could have had drafts.
    """
    per_step = tokens_per_step(settings, decoding.rules)
    # The order of the policy `random` is known from its noise.
    if not decoding.is_random:
        decoding = replace(decoding, readiness=fit_readiness(traces, decoding.mask_token_id, per_step))
    paths = anchor_paths(traces, decoding)
    formulas = select(paths, num_nodes, per_step, objective)
    if not formulas:
        raise ConfigError(
            f"no future state of {len(paths)} steps could be drafted: with policy {settings.policy!r} and block_length "
            f"{settings.block_length} blocks are done too soon; use smaller steps, larger blocks or more prompts"
        )
    counts = count_formulas(paths)
    graph = DraftGraph(
        formulas=tuple(formulas),
        tokens_per_step=per_step,
        counts=tuple(counts[formula] for formula in formulas),
        num_anchors=len(paths),
        readiness=decoding.readiness,
        tokens=decoding.tokens,
    ).parents_first()  # where the tokens of a step vary, a node may have been chosen before its largest subset
    return replace(graph, expected=expected_counts(graph, draft_blocks(graph, traces, decoding)))


@dataclass(frozen=True, slots=True)
class WeightsTrial:
    """What token weights are worth: forwards per generation on prompts held out, mean of some budgets.

    Attributes:
        graph: chosen for the weights.
        without: of the graph that was chosen without.
        with_weights: of `graph`.
    """

    graph: DraftGraph
    without: float
    with_weights: float

    @property
    def helps(self) -> bool:
        """Whether the weights save forwards."""
        return self.with_weights < self.without


def try_token_weights(
    graph: DraftGraph,
    traces: Sequence[PromptTrace],
    held_out: Sequence[PromptTrace],
    decoding: Decoding,
    settings: DllmConfig,
    budgets: Sequence[int],
    num_nodes: int,
    objective: Objective = "gain",
) -> WeightsTrial | None:
    """Fit token weights, make the graph that goes with them, and compare.

    Args:
        graph: made without weights, of the arguments that have the names of `make_graph`'s.
        held_out: other traces than those to calibrate with.
        budgets: to compare at.

    Returns: None where no draft would use the weights: at a temperature, and where no token could have been foreseen.
    """
    tokens = fit_token_weights(traces, decoding.mask_token_id) if decoding.temperature == 0 else None
    if tokens is None:
        return None
    weighed = make_graph(traces, replace(decoding, tokens=tokens), settings, num_nodes, objective)

    def forwards(of: DraftGraph) -> float:
        blocks = draft_blocks(of, held_out, decoding)
        counts = [count_forwards(blocks, budget).with_drafts for budget in budgets]
        return sum(counts) / len(counts) / len(held_out)

    return WeightsTrial(weighed, forwards(graph), forwards(weighed))


def predict(
    graph: DraftGraph,
    traces: Sequence[PromptTrace],
    decoding: Decoding,
    eos_token_id: int | list[int] | None,
    budgets: Sequence[int],
) -> Prediction:
    """Count what the graph would have saved on traces, which should be others than it was made of."""
    texts = [trace if eos_token_id is None else until_eos(trace, eos_token_id) for trace in traces]
    whole, until = draft_blocks(graph, traces, decoding), draft_blocks(graph, texts, decoding)
    return Prediction(
        whole={budget: count_forwards(whole, budget) for budget in budgets},
        until_eos={budget: count_forwards(until, budget) for budget in budgets},
        num_prompts=len(traces),
    )
