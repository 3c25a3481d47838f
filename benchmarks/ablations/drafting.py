"""What the parts of drafting are worth, on traces that `vllm-dllm calibrate --keep-traces` left.

    python -m benchmarks.ablations.drafting graph.json.traces --held-out 0.4

Calibrates on a part of the prompts and prints, for the others, forwards without drafts for each one with them;
refreshes, which no draft saves, are left out of both.
"""

import argparse
import json
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vllm_dllm.calibrate.build import make_graph, split
from vllm_dllm.calibrate.count import Decoding, block_paths
from vllm_dllm.calibrate.record import TraceFile
from vllm_dllm.calibrate.select import Objective, accept_length, select_by_gain
from vllm_dllm.calibrate.simulate import count_forwards, draft_blocks
from vllm_dllm.calibrate.trace import PromptTrace
from vllm_dllm.config import DllmConfig
from vllm_dllm.draft.graph import DraftGraph, Formula
from vllm_dllm.draft.readiness import Readiness
from vllm_dllm.models.interface import family_said
from vllm_dllm.unmask.schedule import unmask_rules

BUDGETS = (3, 5, 8, 10)

BlockPaths = list[tuple[Hashable, ...]]
"""Of each anchor of a block, what its next true states are known by."""


@dataclass(frozen=True, slots=True)
class Material:
    """Traces, divided, and how they were decoded."""

    used: list[PromptTrace]
    held_out: list[PromptTrace]
    settings: DllmConfig
    decoding: Decoding
    model: str = ""

    def graph(self, num_nodes: int, objective: Objective = "gain") -> DraftGraph:
        """Calibrate on the used traces."""
        return make_graph(self.used, self.decoding, self.settings, num_nodes, objective)

    def pruned(self, graph: DraftGraph, is_coupled: bool = True) -> list[float]:
        """Return the ratio by budget when each step and request evaluates its likeliest drafts."""
        blocks = draft_blocks(graph, self.held_out, self.decoding, is_coupled)
        return [count_forwards(blocks, budget).ratio_of_steps for budget in BUDGETS]

    def paths(self, traces: Sequence[PromptTrace], readiness: Readiness, is_tree: bool = False) -> list[BlockPaths]:
        """Return the paths of all blocks; those of a tree tell apart the orders in which a state is reached."""
        decoding = replace(self.decoding, readiness=readiness)
        blocks = [block_paths(block, trace.seed, decoding) for trace in traces for block in trace.blocks]
        return [[_orders(path) if is_tree else path for path in paths] for paths in blocks]

    def fixed(
        self, readiness: Readiness, nodes: Sequence[Hashable] | None = None, is_tree: bool = False
    ) -> list[float]:
        """Return the ratio by budget when each step evaluates the first nodes; None takes those of most gain."""
        if nodes is None:
            used = [path for paths in self.paths(self.used, readiness, is_tree) for path in paths]
            nodes = select_by_gain(used, max(BUDGETS))
        held_out = self.paths(self.held_out, readiness, is_tree)
        return [_ratio(held_out, set(nodes[:budget])) for budget in BUDGETS]


def traces_file(text: str) -> Path:
    """Check the argument of a traces file. Raises: ArgumentTypeError."""
    path, todo = Path(text), "give one that `vllm-dllm calibrate --keep-traces` left"
    try:
        with path.open() as file:
            is_one = "settings" in json.loads(file.readline())
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be read as traces ({error}); {todo}") from None
    if not is_one:
        raise argparse.ArgumentTypeError(f"{text} has no settings in its first line; {todo}")
    return path


def load(path: Path, held_out: float) -> Material:
    """Read a traces file and divide its prompts at random."""
    with path.open() as file:
        head = json.loads(file.readline())["settings"]
    with TraceFile(path, head) as trace_file:
        traces = [trace_file.traces[i] for i in sorted(trace_file.traces)]
    settings = DllmConfig.model_validate({key: head[key] for key in DllmConfig.model_fields if key in head})
    used, rest = split(len(traces), held_out, head["seed"])
    mask_token_id = int(traces[0].blocks[0].canvas[0, -1])  # where every block begins masked
    family = family_said(json.loads((Path(head["model"]) / "config.json").read_text()))
    assert family is not None, "calibrate records models of ours only"
    rules = unmask_rules(family, settings)
    decoding = Decoding(mask_token_id, head["temperature"], settings.policy == "random", rules=rules)
    return Material([traces[i] for i in used], [traces[i] for i in rest], settings, decoding, head["model"])


def _orders(path: Sequence[Formula]) -> tuple[Hashable, ...]:
    return tuple(tuple(path[: depth + 1]) for depth in range(len(path)))


def _ratio(blocks: Sequence[BlockPaths], nodes: set[Hashable]) -> float:
    num_steps = sum(len(paths) for paths in blocks)
    return num_steps / sum(1 for paths in blocks for _ in _forwards(paths, nodes))


def _forwards(paths: BlockPaths, nodes: set[Hashable]) -> Iterator[int]:
    """Yield the anchor of each forward but the refresh."""
    anchor = 0
    while anchor < len(paths):
        yield anchor
        anchor += 1 + accept_length(paths[anchor], nodes)


def ablations(material: Material) -> Iterator[tuple[str, list[float]]]:
    """Yield what is varied and its ratio for each of BUDGETS."""
    by_confidence, ready = Readiness(), material.graph(1).readiness
    chain = DraftGraph.chain(max(BUDGETS)).formulas
    yield "chain, ranks by confidence", material.fixed(by_confidence, chain)
    yield "graph by gain, ranks by confidence", material.fixed(by_confidence)
    objectives: tuple[Objective, ...] = ("degree-0", "degree-1", "full")
    for objective in objectives:
        yield f"graph by {objective}", material.fixed(ready, material.graph(max(BUDGETS), objective).formulas)
    yield "tree by gain", material.fixed(ready, is_tree=True)
    yield "graph by gain", material.fixed(ready)
    for num_nodes in (10, 16, 24, 32, 64):
        yield f"best of {num_nodes} nodes at each step", material.pruned(material.graph(num_nodes))
    if material.decoding.temperature > 0 or material.decoding.is_random:
        yield "best of 32, without the decoder's noise", material.pruned(material.graph(32), is_coupled=False)


def report(material: Material) -> Iterator[str]:
    """Yield the lines of a table."""
    yield "| drafts | " + " | ".join(f"budget {budget}" for budget in BUDGETS) + " |"
    yield "|---" * (1 + len(BUDGETS)) + "|"
    for name, ratios in ablations(material):
        yield f"| {name} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |"


def print_report(make: Callable[[Material], Iterator[str]], description: str | None) -> None:
    """Print the report of the traces that the command line names, line by line as it is made.

    Args:
        make: yields its lines.
        description: of the command.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=traces_file)
    parser.add_argument("--held-out", type=float, default=0.4)
    args = parser.parse_args()
    for line in make(load(args.traces, args.held_out)):
        print(line, flush=True)


if __name__ == "__main__":
    print_report(report, __doc__)
