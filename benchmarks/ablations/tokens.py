"""What better token guesses would save, on traces that `vllm-dllm calibrate --keep-traces` left.

    python -m benchmarks.ablations.tokens graph.json.traces --prompts GSM8K.jsonl --last 60

Drafts whose tokens are chosen, and whose nodes are ranked, by more than the probabilities of one distribution: see
`token_odds`. Calibrates on all prompts but the last ones, at most --first, and measures on those; refreshes are left
out, as no draft saves them. Of traces of a temperature: what it is worth to draw drafts with the decoder's noise.
In brackets: 95 % of the bootstrap over prompts.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad
from transformers import AutoTokenizer

from benchmarks.ablations.drafting import BUDGETS, Material, load, traces_file
from benchmarks.ablations.ranker import interval, last_held_out
from benchmarks.ablations.token_odds import (
    FEATURES,
    Odds,
    Texts,
    fit_by_margin,
    fit_weights,
    make_examples,
    plain,
    texts_of,
)
from vllm_dllm.calibrate.build import make_graph, tokens_per_step
from vllm_dllm.calibrate.count import Decoding, block_paths
from vllm_dllm.calibrate.fit import fit_readiness
from vllm_dllm.calibrate.prompts import encode, read_prompts
from vllm_dllm.calibrate.select import FutureStates, count_formulas, select
from vllm_dllm.calibrate.simulate import (
    BlockDrafts,
    block_roots,
    count_forwards,
    draft_blocks,
    expected_counts,
    found_drafts,
)
from vllm_dllm.calibrate.tokens import OrderTokens, ordered
from vllm_dllm.calibrate.trace import BlockTrace, PromptTrace
from vllm_dllm.draft.compile import CompiledGraph, Filling, compile_graph
from vllm_dllm.draft.graph import MAX_NODES, DraftGraph, Formula
from vllm_dllm.draft.propose import Roots, best_drafts, neighbours, unfilled
from vllm_dllm.draft.prune import Filled, rank_nodes
from vllm_dllm.draft.token_weights import NONE
from vllm_dllm.errors import ConfigError

GRAPH_NODES = 32

Counts = list[NDArray[np.int64]]
"""By budget, each prompt's forwards without and with drafts; [num_prompts, 2]."""

_WEIGHED = {
    "probabilities weighed": ("probability",),
    "weighed by whether a token beside is new": ("probability", "probability beside a new token"),
    "and neighbours that got the same token": (
        "probability",
        "probability beside a new token",
        "same as a new neighbour",
    ),
    "and pairs of the text, without these neighbours": (
        "probability",
        "probability beside a new token",
        "pair with a new neighbour in the text",
    ),
    "all of these": tuple(FEATURES),
}
"""What is varied -> the features of `token_odds` that it has."""


class Guesser:
    """Makes graphs and drafts by odds of tokens, for requests of temperature 0.

    Args:
        material: the traces.
        texts: of all of them.
        odds: of tokens.
    """

    def __init__(self, material: Material, texts: Texts, odds: Odds) -> None:
        self._texts, self._odds, self._material = texts, odds, material
        self._per_step = tokens_per_step(material.settings, material.decoding.rules)
        readiness = fit_readiness(material.used, material.decoding.mask_token_id, self._per_step)
        self._decoding: Decoding = replace(material.decoding, readiness=readiness)

    def graph(self, *, has_seconds: bool = False) -> DraftGraph:
        """Count, choose and expect as `calibrate.build.make_graph` does.

        Args:
            has_seconds: add nodes with second candidates, see `with_seconds`.
        """
        paths = self.paths()
        graph = DraftGraph(tuple(select(paths, GRAPH_NODES, self._per_step)), self._per_step)
        formulas = with_seconds(graph) if has_seconds else graph.formulas
        counts = count_formulas(paths)
        graph = replace(
            graph,
            formulas=formulas,
            counts=tuple(counts[formula] for formula in formulas),
            num_anchors=len(paths),
            readiness=self._decoding.readiness,
        ).parents_first()
        return replace(graph, expected=expected_counts(graph, self.drafts(graph, self._material.used)))

    def paths(self) -> list[FutureStates]:
        """Return the paths of all anchors that are calibrated with."""
        return [
            path
            for trace in self._material.used
            for block in trace.blocks
            for path in block_paths(block, trace.seed, self._decoding, self._order(trace, block))
        ]

    def _order(self, trace: PromptTrace, block: BlockTrace) -> OrderTokens:
        """Order candidates by the odds."""
        text = self._texts[trace.prompt_idx, block.start]

        def odds(token_ids: Tensor, log_probs: Tensor, beside: Tensor) -> Tensor:
            return self._odds(token_ids, log_probs, beside, text)

        return ordered(block, self._decoding.mask_token_id, odds)

    def drafts(self, graph: DraftGraph, traces: Sequence[PromptTrace]) -> list[BlockDrafts]:
        """Make the drafts of every anchor of the traces, as `calibrate.simulate.draft_blocks` does."""
        compiled = compile_graph(graph, torch.device("cpu"))
        return [
            self._block_drafts(compiled, block, self._texts[trace.prompt_idx, block.start])
            for trace in traces
            for block in trace.blocks
        ]

    def _block_drafts(self, graph: CompiledGraph, block: BlockTrace, text: Tensor) -> BlockDrafts:
        roots = block_roots(block, self._decoding)
        log_confidence = roots.candidates.log_probs[..., 0]
        readiness = graph.readiness.log_odds(log_confidence, roots.is_new, roots.terms)[:, None]
        filled = unfilled(roots, graph.num_nodes)
        for filling in graph.by_steps:
            self._fill(filling, roots, readiness, filled, text)
        times = len(graph.num_unmasked)
        ranking = rank_nodes(graph, filled, readiness.expand(-1, times, -1), None, roots.node_terms)
        return found_drafts(block, best_drafts(graph, filled, ranking))

    def _fill(self, filling: Filling, roots: Roots, readiness: Tensor, filled: Filled, text: Tensor) -> None:
        """Fill some nodes from their origins, in place; as in `draft.propose`, but for the tokens."""
        is_open, canvas = filled.is_masked[:, filling.origin], filled.canvas[:, filling.origin]
        is_new = roots.is_new[:, None] | (roots.is_masked[:, None] & ~is_open)
        order = readiness.masked_fill(~is_open, -torch.inf).argsort(dim=-1, descending=True, stable=True)
        rank = filling.position_rank.expand(len(order), -1, -1)
        position = order.gather(-1, rank.clamp(max=order.shape[-1] - 1))  # [num_reqs, num_filled, max_pairs]
        request = torch.arange(len(order))[:, None, None]
        token_ids, log_probs = (
            each[request, position] for each in (roots.candidates.token_ids, roots.candidates.log_probs)
        )
        beside = neighbours(canvas.masked_fill(~is_new, NONE), position)
        odds = self._odds(token_ids, log_probs, beside, text)
        best = odds.argsort(dim=-1, descending=True, stable=True)
        chosen = best.gather(-1, filling.vocab_rank.expand_as(position)[..., None])
        fits = (rank < is_open.sum(-1, keepdim=True)) | ~filling.is_pair
        # A place that stands for no pair writes to a column that is cut off.
        column = position.masked_fill(~filling.is_pair, order.shape[-1])
        tokens = token_ids.gather(-1, chosen)[..., 0]
        filled.canvas[:, filling.node] = pad(canvas, (0, 1)).scatter(-1, column, tokens)[..., :-1]
        filled.is_masked[:, filling.node] = pad(is_open, (0, 1)).scatter(-1, column, value=False)[..., :-1]
        filled.is_valid[:, filling.node] = filled.is_valid[:, filling.origin] & fits.all(-1)
        added = odds.gather(-1, chosen)[..., 0].masked_fill(~filling.is_pair, 0.0).sum(-1)
        filled.log_prob[:, filling.node] = filled.log_prob[:, filling.origin] + added

    def forwards(self, graph: DraftGraph) -> Counts:
        """Count the forwards of the prompts that are held out."""
        return _counts([self.drafts(graph, [trace]) for trace in self._material.held_out])


def with_seconds(graph: DraftGraph) -> tuple[Formula, ...]:
    """Return a graph's formulas, and behind them those with a second candidate in place of a first one.

    Of node after node, each pair that it adds to its first parent, as far as a graph has room; which of them a step
    evaluates say probabilities alone.
    """
    formulas = dict.fromkeys(graph.formulas)
    for formula, parents in zip(graph.formulas, graph.parents, strict=True):
        base = set(graph.formulas[parents[0] - 1]) if parents[0] else set()
        for rank, vocab in sorted(set(formula) - base):
            second = tuple(sorted({*formula} - {(rank, vocab)} | {(rank, 1)}))
            if len(formulas) < MAX_NODES:
                formulas.setdefault(second)
    return tuple(formulas)


def _counts(prompts: Sequence[Sequence[BlockDrafts]]) -> Counts:
    found = [[count_forwards(blocks, budget) for blocks in prompts] for budget in BUDGETS]
    return [np.array([(n.without - n.refreshes, n.with_drafts - n.refreshes) for n in each]) for each in found]


def ablations(material: Material, prompts: Sequence[Sequence[int]]) -> Iterator[tuple[str, Counts]]:
    """Yield what is varied and its forwards; the others are compared with the first one.

    Args:
        material: the traces.
        prompts: tokens of all prompts, by `prompt_idx`.
    """
    if material.decoding.temperature > 0:
        graph = make_graph(material.used, material.decoding, material.settings, GRAPH_NODES)
        for name, is_coupled in (("as served", True), ("without the decoder's noise", False)):
            yield (
                name,
                _counts([draft_blocks(graph, [trace], material.decoding, is_coupled) for trace in material.held_out]),
            )
        return
    traces = [*material.used, *material.held_out]
    texts = texts_of(traces, prompts)
    served = Guesser(material, texts, plain)
    yield "by probability", served.forwards(served.graph())
    yield "with second candidates", served.forwards(served.graph(has_seconds=True))
    examples = make_examples(material.used, texts, material.decoding.mask_token_id)
    by_margin = Guesser(material, texts, fit_by_margin(examples))
    yield "shares by margin and new neighbours", by_margin.forwards(by_margin.graph())
    for name, of in _WEIGHED.items():
        guesser = Guesser(material, texts, fit_weights(examples, of))
        yield name, guesser.forwards(guesser.graph())
    alone = texts_of(traces, prompts, is_prompt_alone=True)
    examples = make_examples(material.used, alone, material.decoding.mask_token_id)
    guesser = Guesser(material, alone, fit_weights(examples, tuple(FEATURES)))
    yield "all of these, the text being the prompt alone", guesser.forwards(guesser.graph())


def right_shares(material: Material, texts: Texts) -> Iterator[tuple[str, float]]:
    """Yield how often the first guess of a position is what it gets, of those that are unmasked soon."""
    mask_token_id = material.decoding.mask_token_id
    used, held_out = (make_examples(traces, texts, mask_token_id) for traces in (material.used, material.held_out))
    yield "by probability", held_out.num_first / len(held_out.truth)
    for name, of in _WEIGHED.items():
        guess = (held_out.features @ fit_weights(used, of).weights).argmax(-1)
        yield name, float((guess == held_out.truth).double().mean())


def report(material: Material, prompts: Sequence[Sequence[int]]) -> Iterator[str]:
    """Yield the lines of a table. Raises: ConfigError for traces of the policy `random`."""
    if material.decoding.is_random:
        raise ConfigError("the traces are of policy 'random', whose order is known; give some of another policy")
    yield "| tokens | " + " | ".join(f"budget {budget}" for budget in BUDGETS) + " |"
    yield "|---" * (1 + len(BUDGETS)) + "|"
    served: Counts = []
    for name, counts in ablations(material, prompts):
        served = served or counts
        yield _row(name, counts)
        if counts is not served:
            yield _row(
                "fewer", [np.stack([its[:, 1], other[:, 1]], 1) for its, other in zip(served, counts, strict=True)]
            )
    if material.decoding.temperature == 0:
        yield ""
        yield "The first guess is right where the token is a candidate:"
        texts = texts_of([*material.used, *material.held_out], prompts)
        yield from (f"{share:.3f} {name}" for name, share in right_shares(material, texts))


def _row(name: str, counts: Counts) -> str:
    cells = (f"{ratio:.3f} [{low:.3f}, {high:.3f}]" for ratio, low, high in map(interval, counts))
    return f"| {name} | " + " | ".join(cells) + " |"


def prompt_tokens(traces: Path, prompts: Path) -> list[list[int]]:
    """Encode the prompts of a traces file anew. Raises: ConfigError for another file of prompts."""
    with traces.open() as file:
        head = json.loads(file.readline())["settings"]
    read = read_prompts(prompts, head["samples"])
    if read.sha256 != head["prompts (SHA-256)"]:
        raise ConfigError(
            f"--prompts is {prompts} with the SHA-256 {read.sha256}, but {traces} has the traces of a file with "
            f"{head['prompts (SHA-256)']}; give the file that was calibrated with"
        )
    tokenizer: Any = AutoTokenizer.from_pretrained(head["model"])
    return [encode(tokenizer, conversation) for conversation in read.conversations]


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=traces_file)
    parser.add_argument("--prompts", type=Path, required=True, help="the file that was calibrated with")
    parser.add_argument("--last", type=int, default=60, help="prompts at the file's end to measure with")
    parser.add_argument(
        "--first", type=int, default=120, help="prompts at the file's beginning to calibrate with, at most"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    material = last_held_out(load(args.traces, 0.5), args.last)
    material = replace(material, used=material.used[: args.first])
    for line in report(material, prompt_tokens(args.traces, args.prompts)):
        print(line, flush=True)


if __name__ == "__main__":
    main()
