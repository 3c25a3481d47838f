"""The native ops against what else does their work on this machine, and against what the machine can do at best.

Nothing here needs vLLM, whose attention takes part where it is installed.
"""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import torch

from benchmarks.kernels import attention, vocab, walk
from benchmarks.kernels.attention import AttentionProblem, AttentionShape
from benchmarks.kernels.floor import Rates, measure_rates
from benchmarks.kernels.layers import LayerStack
from benchmarks.kernels.memory import peak_bytes
from benchmarks.kernels.turns import Contestant, ratio, take_turns
from benchmarks.kernels.vocab import VocabProblem, VocabShape
from benchmarks.kernels.walk import WalkProblem
from vllm_dllm.measure.report import Row, Section, Spread

HEADS = {"LLaDA-8B": (32, 32), "SDAR": (32, 8)}
"""Heads and K/V heads, of 128 each."""

OURS = "csrc"


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is measured: everything with everything."""

    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    contexts: tuple[int, ...] = (256, 1024, 4096)
    block_lengths: tuple[int, ...] = (8, 32)
    drafts: tuple[int, ...] = (0, 3, 10)
    at_once: tuple[int, ...] = (1,)  # requests, for attention
    vocab_sizes: tuple[int, ...] = (4096, 32000, 126464)
    hidden_sizes: tuple[int, ...] = (1024, 4096)
    num_rows: tuple[int, ...] = (32, 352)
    requests: tuple[int, ...] = (1, 16)
    stack_rows: tuple[int, ...] = (32, 64, 128, 256, 352, 512)
    num_rounds: int = 5


SHORT = Sizes(
    contexts=(256,),
    block_lengths=(32,),
    drafts=(0, 3),
    vocab_sizes=(4096,),
    hidden_sizes=(1024,),
    stack_rows=(32, 352),
    num_rounds=3,
)
"""Some seconds on a CPU."""


@dataclass(frozen=True, slots=True)
class KernelBench:
    """A measurement of the ops on a device.

    Attributes:
        sizes: what is measured.
        device: where.
        advance: called before each measurement with a description of it.
    """

    sizes: Sizes
    device: torch.device
    advance: Callable[[str], None]

    def sections(self) -> Iterator[Section]:
        """Measure op after op.

        Raises: UnequalResultsError when contestants differ in what they compute.
        """
        rates = {dtype: measure_rates(self.device, dtype) for dtype in self.sizes.dtypes}
        for dtype, measured in rates.items():
            yield Section(f"draft_graph_attention, {_text(dtype, measured)}", self._attention(dtype, measured))
        for dtype, measured in rates.items():
            yield Section(f"vocab_stats, {_text(dtype, measured)}", self._vocab(dtype, measured))
        yield Section("decide_walk and propose_nodes", self._walk())
        if self.device.type == "cuda":
            measured = measure_rates(self.device, torch.bfloat16)
            yield Section(f"forward of LLaDA-8B's layers, {_text(torch.bfloat16, measured)}", self._stack(measured))

    def _attention(self, dtype: torch.dtype, rates: Rates) -> list[Row]:
        sizes = self.sizes
        settings = product(HEADS.items(), sizes.contexts, sizes.block_lengths, sizes.at_once)
        rows: list[Row] = []
        for (model, (num_heads, num_kv_heads)), context_len, block_length, at_once in settings:
            shape = AttentionShape(num_heads, num_kv_heads, 128, dtype, context_len, block_length, 0, at_once)
            rows += self._drafts(model, shape, rates)
        return rows

    def _drafts(self, model: str, shape: AttentionShape, rates: Rates) -> Iterator[Row]:
        """Measure all numbers of drafts in the same turns."""
        shapes = {drafts: replace(shape, num_drafts=drafts) for drafts in self.sizes.drafts}
        contestants: dict[str, Contestant] = {}
        for drafts, each in shapes.items():
            self.advance(f"attention: {model}, context {shape.context_len}, B {shape.block_length}, {drafts} drafts")
            problem = AttentionProblem(each, self.device)
            contestants |= {f"{drafts} {name}": call for name, call in attention.contestants(problem).items()}
        times = take_turns(contestants, problem.num_sets, self.sizes.num_rounds, self.device)
        first = f"{self.sizes.drafts[0]} {OURS}"
        for drafts, each in shapes.items():
            ours = f"{drafts} {OURS}"
            others = [name for name in times if name.startswith(f"{drafts} ") and name != ours]
            yield {
                "heads": model,
                "context": shape.context_len,
                "B": shape.block_length,
                "requests": shape.num_requests,
                "drafts": drafts,
                "ms": Spread.of(times[ours]),
                "x floor": statistics.median(times[ours]) / each.floor_ms(rates),
                f"x {self.sizes.drafts[0]} drafts": ratio(times, ours, first),
                **{f"{name.partition(' ')[2]} / {OURS}": ratio(times, name, ours) for name in others},
            }

    def _vocab(self, dtype: torch.dtype, rates: Rates) -> list[Row]:
        rows: list[Row] = []
        for vocab_size, hidden_size in product(self.sizes.vocab_sizes, self.sizes.hidden_sizes):
            for num_rows in self.sizes.num_rows:
                self.advance(f"vocab_stats: {vocab_size} ids, {hidden_size} wide, {num_rows} rows")
                shape = VocabShape(vocab_size, hidden_size, num_rows, dtype)
                rows.append(self._vocab_row(shape, rates))
        return rows

    def _vocab_row(self, shape: VocabShape, rates: Rates) -> Row:
        problem = VocabProblem(shape, self.device)
        contestants = vocab.contestants(problem)
        peaks = {name: peak_bytes(partial(call, 0), self.device) for name, call in contestants.items()}
        times = take_turns(contestants, problem.num_sets, self.sizes.num_rounds, self.device)
        return {
            "ids": shape.vocab_size,
            "hidden": shape.hidden_size,
            "rows": shape.num_rows,
            "ms": Spread.of(times[OURS]),
            "x floor": statistics.median(times[OURS]) / shape.floor_ms(rates),
            f"torch / {OURS}": ratio(times, "torch", OURS),
            "peak MiB": peaks[OURS] / 2**20,
            "peak MiB of torch": peaks["torch"] / 2**20,
            "peak, % of fp32 logits": 100 * peaks[OURS] / shape.logits_bytes,
        }

    def _walk(self) -> list[Row]:
        rows: list[Row] = []
        for num_requests in self.sizes.requests:
            greedy, noisy = (WalkProblem(num_requests, 32, has_noise, self.device) for has_noise in (False, True))
            ops = {
                "decide_walk": walk.decide_contestants(greedy),
                "propose_nodes": walk.propose_contestants(greedy),
                "propose_nodes, with noise": walk.propose_contestants(noisy),
            }
            for op, contestants in ops.items():
                self.advance(f"{op}: {num_requests} requests")
                # Some milliseconds a turn, and no data to find cold.
                times = take_turns(contestants, 20, self.sizes.num_rounds, self.device)
                rows.append(
                    {
                        "op": op,
                        "requests": num_requests,
                        "us": Spread.of([1e3 * ms for ms in times[OURS]]),
                        f"torch / {OURS}": ratio(times, "torch", OURS),
                    }
                )
        return rows

    def _stack(self, rates: Rates) -> list[Row]:
        stack = LayerStack.random(self.device)
        self.advance(f"{stack.num_layers} layers")
        contestants = {str(num_rows): stack.contestant(num_rows) for num_rows in self.sizes.stack_rows}
        times = take_turns(contestants, 1, self.sizes.num_rounds, self.device)
        first = str(self.sizes.stack_rows[0])
        return [
            {
                "layers": stack.num_layers,
                "rows": num_rows,
                "ms": Spread.of(times[str(num_rows)]),
                "x floor": statistics.median(times[str(num_rows)]) / stack.floor_ms(num_rows, rates),
                f"x {first} rows": ratio(times, str(num_rows), first),
            }
            for num_rows in self.sizes.stack_rows
        ]


def _text(dtype: torch.dtype, rates: Rates) -> str:
    return f"{str(dtype).removeprefix('torch.')} ({rates})"
