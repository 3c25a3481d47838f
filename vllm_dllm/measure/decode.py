"""Speculation against none: the same prompts with each budget, in turns, so that a machine's moods hit all alike."""

import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from vllm_dllm.draft.graph import DraftGraph
from vllm_dllm.draft.graph_file import GraphFile, dump_graph
from vllm_dllm.measure.process import EngineProcess
from vllm_dllm.measure.report import Interval, Row, Section, Spread
from vllm_dllm.measure.workload import EngineSpec, Measurement, UnequalTokensError, Workload
from vllm_dllm.spiffy_config import DEFAULT_GRAPH, DEFAULT_MAX_NODES, METHOD

OFF, AUTO, RANKER = "off", "auto", "ranker"
MIN_STEPS = 10
"""Fewer steps of a kind are no measurement."""


@dataclass(frozen=True, slots=True)
class Policy:
    """An unmasking policy to measure, or the rule of a model whose windows slide.

    Attributes:
        settings: of the server.
        draft_graph: as in `speculative_config`; `default` is the one of this policy.
        ranker: of a way more, `auto` with this order ranker; None: there is none.
    """

    settings: dict[str, Any]
    draft_graph: str = DEFAULT_GRAPH
    ranker: str | None = None

    @property
    def name(self) -> str:
        """What tables call it: a policy and its parameters, or what a rule without a name goes by."""
        has_name = "policy" in self.settings
        return " ".join(f"{value}" if has_name else f"{name} {value}" for name, value in self.settings.items())


@dataclass(frozen=True, slots=True)
class Variant:
    """A way to decode: the engine that does it, and the budget that this engine is given for it.

    Engines are `off`, `auto`, `ranker` (auto with one), `budget` and `chain`, all alive at once; the latter two
    evaluate any budget up to their largest.
    """

    engine: str
    budget: int | None = None

    @property
    def name(self) -> str:
        """What tables call it."""
        return self.engine if self.budget is None else f"{self.engine} {self.budget}"


@dataclass(frozen=True, slots=True)
class Comparison:
    """What to compare.

    Attributes:
        workload: the requests.
        policies: each is measured by itself.
        budgets: fixed budgets of the draft graph.
        chain: fixed budgets of a chain graph, as FreeDave (arXiv:2510.00294) and SSD (arXiv:2510.04147) draft.
        repeats: rounds in which everyone decodes the workload once, behind each start.
        dtype: of the engines.
        starts: of all engines. Two engines of the same settings differ by some percent as long as they live, since
            their memory lies elsewhere, so rounds of one start say less than their number.
        waves: prompts of a round for each request in flight, other ones in the next round; None: all prompts.
    """

    workload: Workload
    policies: tuple[Policy, ...]
    budgets: tuple[int, ...] = (1, 3, 5)
    chain: tuple[int, ...] = (3,)
    repeats: int = 3
    dtype: str = "float32"
    starts: int = 1
    waves: int | None = None

    def prompts(self, concurrency: int, number: int) -> tuple[int, int]:
        """Return the first prompt of a round, and how many it has."""
        total = len(self.workload.prompts)
        size = total if self.waves is None else min(total, self.waves * concurrency)
        return number % (total // size) * size, size

    @property
    def variants(self) -> list[Variant]:
        """All ways to decode; the first is what the others are compared with."""
        fixed = [Variant("budget", budget) for budget in self.budgets]
        ranked = [Variant(RANKER)] if any(policy.ranker for policy in self.policies) else []
        chains = [Variant("chain", budget) for budget in self.chain]
        return [Variant(OFF), *fixed, Variant(AUTO), *ranked, *chains]

    def specs(self, policy: Policy) -> dict[str, EngineSpec]:
        """Return the engines that a policy's variants need."""
        speculation: dict[str, dict[str, Any] | None] = {
            OFF: None,
            AUTO: {"draft_graph": policy.draft_graph, "budget": AUTO},
        }
        if policy.ranker is not None:
            speculation[RANKER] = {"draft_graph": policy.draft_graph, "budget": AUTO, "ranker": policy.ranker}
        if self.budgets:
            speculation["budget"] = {"draft_graph": policy.draft_graph, "budget": max(self.budgets)}
        if self.chain:
            most = max(self.chain)
            graph = json.loads(dump_graph(GraphFile(DraftGraph.chain(most))))
            speculation["chain"] = {"draft_graph": graph, "budget": most}
        most_drafts = max([DEFAULT_MAX_NODES, *self.budgets, *self.chain])
        return {
            name: EngineSpec(
                self.workload, policy.settings, config and {"method": METHOD, **config}, self.dtype, most_drafts
            )
            for name, config in speculation.items()
        }


@dataclass(frozen=True, slots=True)
class Key:
    """What a measurement is of."""

    policy: str
    concurrency: int
    variant: str


Runs = dict[Key, list[Measurement]]
"""Measurements of each kind, one per round."""


def in_turns(variants: Sequence[Variant], repeats: int) -> Iterator[tuple[int, Variant]]:
    """Yield all variants in each round, forth and back by turns, so that none is always the one behind another."""
    for number in range(repeats):
        yield from ((number, variant) for variant in (variants if number % 2 == 0 else reversed(variants)))


def compare(comparison: Comparison, advance: Callable[[str], None]) -> Runs:
    """Measure, and check that everyone decodes the same tokens.

    Args:
        comparison: what to compare.
        advance: called before each measurement with what it is.

    Raises: UnequalTokensError, and EngineEndedError.
    """
    runs: defaultdict[Key, list[Measurement]] = defaultdict(list)
    for policy in comparison.policies:
        first: dict[int, tuple[Key, list[int]]] = {}
        for start in range(comparison.starts):
            for key, index, measurement in _measure(comparison, policy, start, advance):
                runs[key].append(measurement)
                check_tokens(first, key, index, measurement.tokens)
    return dict(runs)


def _measure(
    comparison: Comparison, policy: Policy, start: int, advance: Callable[[str], None]
) -> Iterator[tuple[Key, int, Measurement]]:
    """Start all engines; measure a policy at each number of requests at once after a warm-up, with the first prompt."""
    with ExitStack() as stack:
        engines: dict[str, EngineProcess] = {}
        for name, spec in comparison.specs(policy).items():
            advance(f"{policy.name}: start of {name}")
            engines[name] = stack.enter_context(EngineProcess(spec))
        for concurrency in comparison.workload.concurrency:
            for name, engine in engines.items():
                advance(f"{policy.name}: warm-up of {name}, {concurrency} at once")
                engine.measure(concurrency, num_prompts=concurrency)
            for number, variant in in_turns(comparison.variants, comparison.repeats):
                advance(f"{policy.name}: {variant.name}, {concurrency} at once")
                first, size = comparison.prompts(concurrency, start * comparison.repeats + number)
                measurement = engines[variant.engine].measure(concurrency, variant.budget, size, first)
                yield Key(policy.name, concurrency, variant.name), first, measurement


def num_measurements(comparison: Comparison) -> int:
    """Return how often `compare` calls `advance`."""
    num_engines = len(comparison.specs(comparison.policies[0]))
    per_concurrency = num_engines + len(comparison.variants) * comparison.repeats
    per_start = num_engines + len(comparison.workload.concurrency) * per_concurrency
    return len(comparison.policies) * comparison.starts * per_start


def check_tokens(first: dict[int, tuple[Key, list[int]]], key: Key, index: int, tokens: list[list[int]]) -> None:
    """Compare the tokens of prompts from `index` on with those of whoever of a policy decoded each of them first.

    Raises: UnequalTokensError.
    """
    for number, found in enumerate(tokens, index):
        by, expected = first.setdefault(number, (key, found))
        if expected != found:
            raise UnequalTokensError(
                f"policy {key.policy}, {key.variant}, {key.concurrency} at once: the tokens of prompt {number} "
                f"(from 0) differ from those of {by.variant}, {by.concurrency} at once; expected {expected}, "
                f"found {found}"
            )


def sections(runs: Runs, starts: int = 1) -> list[Section]:
    """Make the tables of the measurements, of which an equal part is behind each start."""
    return [
        Section("speed: median of the rounds (least to most); ratios are to off of the same round", _speeds(runs)),
        Section("share of forwards whose drafts were accepted to this depth", _depths(runs)),
        Section("step without a refresh: median milliseconds, median rows of its whole forward", _step_times(runs)),
        Section("ratio to off of the same round: median [95 % of its bootstrap]", _intervals(runs, starts)),
    ]


def ratios(runs: Runs, key: Key) -> list[float]:
    """Return, for each round, the tokens per second as a multiple of those without speculation."""
    off = runs[Key(key.policy, key.concurrency, OFF)]
    return [a.tokens_per_s / b.tokens_per_s for a, b in zip(runs[key], off, strict=True)]


def cpu_ratios(runs: Runs, key: Key) -> list[float]:
    """Return, for each round, the CPU seconds without speculation as a multiple of those with it."""
    off = runs[Key(key.policy, key.concurrency, OFF)]
    return [b.cpu_seconds / a.cpu_seconds for a, b in zip(runs[key], off, strict=True)]


def _intervals(runs: Runs, starts: int) -> list[Row]:
    return [
        {
            "policy": key.policy,
            "at once": key.concurrency,
            "drafts": key.variant,
            "tokens/s": str(Interval.of(ratios(runs, key), starts)),
            "tokens per CPU second": str(Interval.of(cpu_ratios(runs, key), starts)),
        }
        for key in runs
        if key.variant != OFF
    ]


def _speeds(runs: Runs) -> list[Row]:
    return [_speed(runs, key) for key in runs]


def _speed(runs: Runs, key: Key) -> Row:
    measurements = runs[key]
    tokens = sum(measurement.num_tokens for measurement in measurements)
    forwards = sum(measurement.stats.forwards for measurement in measurements)
    refreshes = sum(measurement.stats.refreshes for measurement in measurements)
    proposed = sum(sum(measurement.stats.proposed) for measurement in measurements)
    accepted = sum(measurement.stats.total_accepted for measurement in measurements)
    return {
        "policy": key.policy,
        "at once": key.concurrency,
        "drafts": key.variant,
        "tokens/s": Spread.of([measurement.tokens_per_s for measurement in measurements]),
        "ratio": Spread.of(ratios(runs, key)),
        "NFE/token": (forwards + refreshes) / tokens,
        "refreshes/token": refreshes / tokens,
        "drafts/forward": proposed / forwards,
        "accepted/forward": accepted / forwards,
        "waste": 1 - accepted / proposed if proposed else 0.0,
    }


def _depths(runs: Runs) -> list[Row]:
    """Sum over numbers of requests at once; depths beyond the longest accept path are left out."""
    kinds: defaultdict[tuple[str, str], list[Measurement]] = defaultdict(list)
    for key, measurements in runs.items():
        if key.variant != OFF:
            kinds[key.policy, key.variant] += measurements
    rows: list[Row] = []
    for (policy, variant), measurements in kinds.items():
        forwards = sum(measurement.stats.forwards for measurement in measurements)
        accepted = [sum(counts) for counts in zip(*(m.stats.accepted for m in measurements), strict=True)]
        shares = {f"{depth}": count / forwards for depth, count in enumerate(accepted, start=1)}
        rows.append({"policy": policy, "drafts": variant, **shares})
    deepest = max((int(name) for row in rows for name, share in row.items() if name.isdecimal() and share), default=1)
    return [
        {name: value for name, value in row.items() if not name.isdecimal() or int(name) <= deepest} for row in rows
    ]


def _step_times(runs: Runs) -> list[Row]:
    """Take all measurements together: what a step costs depends on its rows, not on why they are there.

    Rows are all that the forwards had: of what is denoised, of drafts, and of what is stored.
    """
    steps: defaultdict[tuple[bool, int, int], list[tuple[int, float]]] = defaultdict(list)
    for key, measurements in runs.items():
        for measurement in measurements:
            for (num_reqs, budget), taken in measurement.steps.items():
                steps[key.variant == OFF, num_reqs, budget] += taken
    return [
        {
            "engine": OFF if is_off else "with drafts",
            "requests": num_reqs,
            "most drafts": budget,
            "rows": statistics.median_low(rows for rows, _ in taken),
            "steps": len(taken),
            "ms": statistics.median(ms for _, ms in taken),
        }
        for (is_off, num_reqs, budget), taken in sorted(steps.items(), key=lambda item: (not item[0][0], item[0][1:]))
        if len(taken) >= MIN_STEPS
    ]
