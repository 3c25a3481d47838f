"""What an order ranker saves: forwards with and without it, on traces that `vllm-dllm calibrate --keep-traces` left.

    python -m benchmarks.ablations.ranker graph.json.traces --last 40 --others code.json.traces hot.json.traces

Trains on all prompts but the last ones of the file and measures on those, refreshes left out, as no draft saves them;
then on all prompts of the other files, with the same ranker and the same graphs. In brackets: 95 % of the bootstrap
over prompts.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.ablations.drafting import BUDGETS, Material, load, traces_file
from vllm_dllm.calibrate.build import make_graph, tokens_per_step
from vllm_dllm.calibrate.count import Decoding
from vllm_dllm.calibrate.fit import fit_readiness
from vllm_dllm.calibrate.simulate import count_forwards, draft_blocks
from vllm_dllm.calibrate.trace import PromptTrace
from vllm_dllm.calibrate.train import Examples, make_examples, next_share, train_ranker
from vllm_dllm.draft.graph import DraftGraph
from vllm_dllm.draft.ranker import OrderRanker
from vllm_dllm.errors import ConfigError

GRAPH_NODES = 32
NUM_RESAMPLES = 2000
NUM_TIMED = 200


def last_held_out(material: Material, count: int) -> Material:
    """Hold out the last prompts of the file. Raises: ConfigError where none is left to train with."""
    traces = sorted([*material.used, *material.held_out], key=lambda trace: trace.prompt_idx)
    if not 0 < count < len(traces):
        raise ConfigError(f"--last is {count}, allowed are 1..{len(traces) - 1} of the {len(traces)} prompts")
    return replace(material, used=traces[:-count], held_out=traces[-count:])


@dataclass(frozen=True, slots=True)
class Drafters:
    """Draft graphs of the same prompts: one for the plain order, and one for the order by the ranker."""

    plain: DraftGraph
    ranked: DraftGraph
    ranker: OrderRanker

    def rows(self, traces: Sequence[PromptTrace], decoding: Decoding) -> Iterator[str]:
        """Yield the table's rows of some prompts, which were decoded as `decoding` says."""
        off = forwards(self.plain, traces, decoding)
        on = forwards(self.ranked, traces, replace(decoding, ranker=self.ranker))
        yield _row("off", off)
        yield _row("on", on)
        yield _row("off / on", [np.stack([its[:, 1], other[:, 1]], 1) for its, other in zip(off, on, strict=True)])


def forwards(graph: DraftGraph, traces: Sequence[PromptTrace], decoding: Decoding) -> list[NDArray[np.int64]]:
    """Return by budget each prompt's forwards without and with drafts, [num_prompts, 2], no refreshes."""
    blocks = [draft_blocks(graph, [trace], decoding) for trace in traces]
    found = [[count_forwards(each, budget) for each in blocks] for budget in BUDGETS]
    return [np.array([(n.without - n.refreshes, n.with_drafts - n.refreshes) for n in each]) for each in found]


def interval(counts: NDArray[np.int64]) -> tuple[float, float, float]:
    """Return the quotient of two sums over prompts, and between what 95 % of its bootstrap lies.

    Args:
        counts: [num_prompts, 2], dividend and divisor.
    """
    chosen = np.random.default_rng(0).integers(len(counts), size=(NUM_RESAMPLES, len(counts)))
    dividend, divisor = np.moveaxis(counts[chosen].sum(1), -1, 0)
    low, high = np.quantile(dividend / divisor, [0.025, 0.975])
    total = counts.sum(0)
    return float(total[0] / total[1]), float(low), float(high)


def milliseconds(ranker: OrderRanker, examples: Examples, num_reqs: int) -> float:
    """Return the median time of a pass over so many roots, on one thread."""
    log_probs = torch.rand(num_reqs, examples.is_new.shape[1], 8, dtype=torch.float64).log().sort(descending=True)[0]
    is_masked, is_new = examples.is_masked[:num_reqs, 0], examples.is_new[:num_reqs]
    times = []
    for _ in range(NUM_TIMED):
        begin = time.perf_counter()
        ranker.terms(log_probs, is_masked, is_new)
        times.append(1e3 * (time.perf_counter() - begin))
    return float(np.median(times))


def report(material: Material, others: Sequence[tuple[str, Material]] = ()) -> Iterator[str]:
    """Yield the lines of a table and what follows it, then a table for each of the others, by name.

    Raises: ConfigError for traces of the policy `random`, and for others that were decoded under other settings.
    """
    if material.decoding.is_random:
        raise ConfigError("the traces are of policy 'random', whose order is known; give some of another policy")
    for name, other in others:
        _check_alike(material, name, other)
    per_step = tokens_per_step(material.settings, material.decoding.rules)
    mask_token_id = material.decoding.mask_token_id
    used, held_out = (make_examples(traces, mask_token_id) for traces in (material.used, material.held_out))
    if used is None or held_out is None:
        raise ConfigError("the traces have no block of two steps; give some of smaller steps")
    readiness = fit_readiness(material.used, mask_token_id, per_step)
    begin = time.perf_counter()
    ranker = train_ranker(used, readiness, is_one_by_one=per_step == 1, seed=0)
    seconds = time.perf_counter() - begin
    plain, ranked = (
        make_graph(material.used, decoding, material.settings, GRAPH_NODES)
        for decoding in (material.decoding, replace(material.decoding, ranker=ranker))
    )
    drafters = Drafters(plain, ranked, ranker)
    yield from _HEAD
    yield from drafters.rows(material.held_out, material.decoding)
    yield ""
    without, with_ranker = (next_share(held_out, readiness, each) for each in (None, ranker))
    yield f"The readiest position comes next: {without:.3f}, with the ranker {with_ranker:.3f}."
    yield f"Training on {len(material.used)} prompts, {len(used.features)} steps: {seconds:.0f} s."
    for num_reqs in (1, 8):
        yield f"A pass for {num_reqs} requests: {milliseconds(ranker, held_out, num_reqs):.2f} ms."
    for name, other in others:
        traces = [*other.used, *other.held_out]
        yield from ("", f"{name}: {len(traces)} prompts, temperature {other.decoding.temperature:g}", "", *_HEAD)
        yield from drafters.rows(traces, other.decoding)


_HEAD = (
    "| ranker | " + " | ".join(f"budget {budget}" for budget in BUDGETS) + " |",
    "|---" * (1 + len(BUDGETS)) + "|",
)


def _check_alike(material: Material, name: str, other: Material) -> None:
    """Check that traces are of the same model and settings. Raises: ConfigError."""
    if (other.model, other.settings) != (material.model, material.settings):
        raise ConfigError(
            f"{name} has traces of {other.model} under {other.settings}, allowed are those of {material.model} under "
            f"{material.settings}; decode its prompts with the same model and settings"
        )


def _row(name: str, counts: Sequence[NDArray[np.int64]]) -> str:
    cells = (f"{ratio:.2f} [{low:.2f}, {high:.2f}]" for ratio, low, high in map(interval, counts))
    return f"| {name} | " + " | ".join(cells) + " |"


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=traces_file)
    parser.add_argument("--last", type=int, default=40, help="prompts at the file's end to measure with")
    parser.add_argument("--others", type=traces_file, nargs="+", default=[], help="traces of other prompts to measure")
    args = parser.parse_args()
    torch.set_num_threads(1)
    others = [(path.name, load(path, 0.5)) for path in args.others]
    for line in report(last_held_out(load(args.traces, 0.5), args.last), others):
        print(line, flush=True)


if __name__ == "__main__":
    main()
