"""How far drafts could go: forwards if the order of positions, their tokens or both were known, and where chains end.

    python -m benchmarks.ablations.ceiling graph.json.traces --held-out 0.4

For traces of temperature 0. An ideal drafter evaluates, at each step, the nodes that are likeliest reached by what it
knows, best first, each behind the one it continues: no graph limits their form. What it does not know it takes from the
anchor's statistics, as drafts are made in the engine: positions by the calibrated readiness, tokens by their
probabilities. Calibrates on a part of the prompts and measures on the others; refreshes are left out, as no draft saves
them.
"""

import heapq
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.ablations.drafting import BUDGETS, Material, print_report
from vllm_dllm.calibrate.build import tokens_per_step
from vllm_dllm.calibrate.trace import BlockTrace
from vllm_dllm.draft.graph import MAX_CANDIDATES
from vllm_dllm.draft.readiness import Readiness
from vllm_dllm.errors import ConfigError

GRAPH_NODES = 32

State = frozenset[tuple[int, int]]
"""What a node adds to the root: positions and their tokens."""

Choice = tuple[float, State]
"""What a step may add, and the logarithm of its probability."""

End = Literal["block", "positions", "tokens"]
"""Why an accept path is no longer: the block ends; no evaluated draft unmasks the positions that come next; one does,
with other tokens."""


@dataclass(frozen=True, slots=True)
class Known:
    """What a drafter knows of the steps to come."""

    order: bool
    tokens: bool


KNOWN = {
    "nothing known": Known(order=False, tokens=False),
    "order known": Known(order=True, tokens=False),
    "tokens known": Known(order=False, tokens=True),
    "both known": Known(order=True, tokens=True),
}


@dataclass(frozen=True, slots=True)
class Anchor:
    """A step's statistics, and what really came of its root.

    Attributes:
        is_masked: [block_length] bool, of the root.
        is_new: [block_length] bool, unmasked by the step that made the root.
        token_ids, log_probs: [block_length, num_candidates], most probable first.
        steps: what each later step adds, up to the last that leaves a mask.
        end: [block_length], the block's tokens in the end.
    """

    is_masked: NDArray[np.bool_]
    is_new: NDArray[np.bool_]
    token_ids: NDArray[np.int32]
    log_probs: NDArray[np.float64]
    steps: tuple[State, ...]
    end: NDArray[np.int32]


def anchors_of(block: BlockTrace, mask_token_id: int) -> list[Anchor]:
    """Return a block's anchors, one for each step but the last."""
    is_masked = block.canvas == mask_token_id
    added = [
        frozenset(
            (int(i), int(block.canvas[step + 1, i])) for i in np.flatnonzero(is_masked[step] & ~is_masked[step + 1])
        )
        for step in range(block.num_steps)
    ]
    return [
        Anchor(
            is_masked=is_masked[step + 1],
            is_new=is_masked[step] & ~is_masked[step + 1],
            token_ids=block.token_ids[step, :, :MAX_CANDIDATES],
            log_probs=block.log_probs[step, :, :MAX_CANDIDATES],
            steps=tuple(added[step + 1 : -1]),
            end=block.canvas[-1],
        )
        for step in range(block.num_steps - 1)
    ]


def likeliest_sets(
    log_odds: Sequence[tuple[float, int]], *, is_one_by_one: bool
) -> Iterator[tuple[float, frozenset[int]]]:
    """Yield the sets of positions that a step may unmask, likeliest first, with the logarithms of their probabilities.

    Args:
        log_odds: readiness and position of each that is masked, at least one.
        is_one_by_one: as `draft.prune.log_choices`.
    """
    if is_one_by_one:
        log_z = float(torch.tensor([odds for odds, _ in log_odds], dtype=torch.float64).logsumexp(0))
        yield from (
            (odds - log_z, frozenset([i])) for odds, i in sorted(log_odds, key=lambda item: (-item[0], item[1]))
        )
        return
    base = frozenset(i for odds, i in log_odds if odds > 0)
    log_none = -math.fsum(math.log1p(math.exp(-abs(odds))) + max(odds, 0.0) for odds, _ in log_odds)
    log_base = log_none + math.fsum(odds for odds, _ in log_odds if odds > 0)
    log_any = math.log(-math.expm1(log_none))
    flips = sorted((abs(odds), i) for odds, i in log_odds)
    # Sets by the sum of what is flipped: each is followed by one more flip, and by the last one moved on.
    queue: list[tuple[float, int, frozenset[int]]] = [(0.0, -1, frozenset())]
    while queue:
        cost, last, flipped = heapq.heappop(queue)
        chosen = base ^ flipped
        if chosen:
            yield log_base - cost - log_any, chosen
        if last + 1 < len(flips):
            following, i = flips[last + 1]
            heapq.heappush(queue, (cost + following, last + 1, flipped | {i}))
            if last >= 0:
                heapq.heappush(queue, (cost - flips[last][0] + following, last + 1, flipped - {flips[last][1]} | {i}))


def likeliest_tokens(anchor: Anchor, positions: frozenset[int], count: int) -> list[Choice]:
    """Return the `count` likeliest fillings of some positions by the anchor's candidates, likeliest first."""
    fillings: list[Choice] = [(0.0, frozenset())]
    for i in sorted(positions):
        candidates = list(zip(anchor.log_probs[i].tolist(), anchor.token_ids[i].tolist(), strict=True))
        longer = ((p + log_p, state | {(i, token)}) for p, state in fillings for log_p, token in candidates)
        fillings = heapq.nlargest(count, longer, key=lambda choice: choice[0])
    return fillings


class Drafter:
    """Chooses an anchor's nodes best first."""

    def __init__(self, known: Known, readiness: Readiness, *, is_one_by_one: bool) -> None:
        self._known, self._readiness, self._is_one_by_one = known, readiness, is_one_by_one

    def nodes(self, anchor: Anchor, count: int) -> list[State]:
        """Return at most `count` nodes, each behind its parent."""
        found: dict[State, None] = {}
        tie = itertools.count()
        queue: list[tuple[float, int, int, State]] = []

        def extend(log_reach: float, depth: int, state: State) -> None:
            for log_p, added in self._choices(anchor, depth, state, count):
                heapq.heappush(queue, (-log_reach - log_p, next(tie), depth + 1, state | added))

        extend(0.0, 0, frozenset())
        while queue and len(found) < count:
            cost, _, depth, state = heapq.heappop(queue)
            if state not in found and len(state) < anchor.is_masked.sum():
                found[state] = None
                extend(-cost, depth, state)
        return list(found)

    def _choices(self, anchor: Anchor, depth: int, state: State, count: int) -> list[Choice]:
        if self._known.order:
            sets = iter([(0.0, frozenset(i for i, _ in step)) for step in anchor.steps[depth : depth + 1]])
        else:
            sets = likeliest_sets(self.log_odds(anchor, state), is_one_by_one=self._is_one_by_one)
        choices = []
        for log_p, positions in itertools.islice(sets, count):
            if self._known.tokens:
                fillings: list[Choice] = [(0.0, frozenset((i, int(anchor.end[i])) for i in positions))]
            else:
                fillings = likeliest_tokens(anchor, positions, count)
            choices += [(log_p + filled, added) for filled, added in fillings]
        return heapq.nlargest(count, choices, key=lambda choice: choice[0])

    def log_odds(self, anchor: Anchor, state: State) -> list[tuple[float, int]]:
        """Return readiness and position of each that is masked behind a node."""
        added = [i for i, _ in state]
        is_new, is_open = anchor.is_new.copy(), anchor.is_masked.copy()
        is_new[added], is_open[added] = True, False
        odds = self._readiness.log_odds(torch.from_numpy(anchor.log_probs[:, 0]), torch.from_numpy(is_new)).tolist()
        return [(odds[i], i) for i in np.flatnonzero(is_open).tolist()]


def accept_length(anchor: Anchor, nodes: Sequence[State]) -> int:
    """Return how many of the true next canvases are nodes, from the first on."""
    evaluated, state = set(nodes), frozenset[tuple[int, int]]()
    for depth, step in enumerate(anchor.steps):
        state |= step
        if state not in evaluated:
            return depth
    return len(anchor.steps)


def ratio(blocks: Sequence[Sequence[Anchor]], drafter: Drafter, budget: int) -> float:
    """Return forwards without drafts for each one with them, refreshes left out."""
    num_forwards = 0
    for anchors in blocks:
        step = 0
        while step < len(anchors):
            num_forwards += 1
            step += 1 + accept_length(anchors[step], drafter.nodes(anchors[step], budget))
    return sum(map(len, blocks)) / max(num_forwards, 1)


def ends(blocks: Sequence[Sequence[Anchor]], drafter: Drafter, budget: int) -> Counter[End]:
    """Count why accept paths of `budget` nodes end."""
    found: Counter[End] = Counter()
    for anchors in blocks:
        step = 0
        while step < len(anchors):
            anchor = anchors[step]
            nodes = drafter.nodes(anchor, budget)
            length = accept_length(anchor, nodes)
            found[_end(anchor, length, nodes)] += 1
            step += 1 + length
    return found


def _end(anchor: Anchor, length: int, nodes: Sequence[State]) -> End:
    if length == len(anchor.steps):
        return "block"
    positions = {i for step in anchor.steps[: length + 1] for i, _ in step}
    return "tokens" if any({i for i, _ in node} == positions for node in nodes) else "positions"


def first_guesses(blocks: Sequence[Sequence[Anchor]], drafter: Drafter) -> tuple[float, float]:
    """Return how often the readiest position comes next, and how often what comes next has the likeliest token."""
    positions, tokens = [], []
    for anchor in itertools.chain.from_iterable(blocks):
        if anchor.steps:
            coming = dict(anchor.steps[0])
            _, readiest = max(drafter.log_odds(anchor, frozenset()), key=lambda item: (item[0], -item[1]))
            positions.append(readiest in coming)
            tokens += [token == anchor.token_ids[i, 0] for i, token in coming.items()]
    return float(np.mean(positions)), float(np.mean(tokens))


def report(material: Material) -> Iterator[str]:
    """Yield the lines of two tables and of what follows them.

    Raises: ConfigError for traces that have noise, or whose steps unmask a fixed number of positions other than 1.
    """
    if material.decoding.temperature > 0 or material.decoding.is_random:
        raise ConfigError("the traces are of a temperature or of policy 'random'; give some of temperature 0")
    per_step = tokens_per_step(material.settings, material.decoding.rules)
    if per_step not in {1, None}:
        raise ConfigError(
            f"steps of the traces unmask {per_step} positions each; give traces with steps_per_block unset"
        )
    graph = material.graph(GRAPH_NODES)
    mask_token_id = material.decoding.mask_token_id
    blocks = [anchors_of(block, mask_token_id) for trace in material.held_out for block in trace.blocks]
    drafters = {name: Drafter(known, graph.readiness, is_one_by_one=per_step == 1) for name, known in KNOWN.items()}
    yield "| drafts | " + " | ".join(f"budget {budget}" for budget in BUDGETS) + " |"
    yield "|---" * (1 + len(BUDGETS)) + "|"
    yield _row(f"best of {GRAPH_NODES} nodes of a calibrated graph", material.pruned(graph))
    for name, drafter in drafters.items():
        yield _row(name, [ratio(blocks, drafter, budget) for budget in BUDGETS])
    yield ""
    yield "| why accept paths end, nothing known | " + " | ".join(f"budget {budget}" for budget in BUDGETS) + " |"
    yield "|---" * (1 + len(BUDGETS)) + "|"
    counts = [ends(blocks, drafters["nothing known"], budget) for budget in BUDGETS]
    for end in get_args(End):
        yield _row(end, [count[end] / max(count.total(), 1) for count in counts])
    yield ""
    position, token = first_guesses(blocks, drafters["nothing known"])
    yield f"The readiest position comes next: {position:.3f}. What comes next is the likeliest token: {token:.3f}."


def _row(name: str, values: Sequence[float]) -> str:
    return f"| {name} | " + " | ".join(f"{value:.2f}" for value in values) + " |"


if __name__ == "__main__":
    print_report(report, __doc__)
