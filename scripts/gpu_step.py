"""A whole step of an 8B model without vLLM: random weights, the plan, forward, LM head, walk and report that serve.

    python scripts/gpu_step.py llada --contexts 1024,4096 --batches 1,4,16 --drafts 0,3,5

Prints a Markdown table in milliseconds: `before` is the host's work before the forward, `forward` and `after` (LM head,
walk, report) what the device takes, `host` what of the step (`wall`) neither covers. Missing are vLLM's scheduler and
runner, some 1 ms of host, and rotary embeddings, 1 % of a layer. On a GPU the forward is a captured CUDA graph.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding, linear, pad, rms_norm, silu

import vllm_dllm.draft
from vllm_dllm.attention.csrc import CsrcAttention
from vllm_dllm.attention.interface import Heads, Plan
from vllm_dllm.attention.layout import CapturedLayout, ForwardLayout
from vllm_dllm.denoiser import Denoiser
from vllm_dllm.draft.calibrated import GraphDrafter
from vllm_dllm.draft.graph import DraftGraph
from vllm_dllm.draft.readiness import Readiness
from vllm_dllm.engine.plan import plan_step
from vllm_dllm.engine.step import Step, rows_to_device
from vllm_dllm.state.canvas import Blocks, CanvasState
from vllm_dllm.state.kv import KvStep
from vllm_dllm.state.request_params import RequestParams
from vllm_dllm.state.settle import Emission, Ledger, choose_settle
from vllm_dllm.state.step_rows import RowInputs, Sequences, choose_rows
from vllm_dllm.unmask.head import LogitsHead
from vllm_dllm.unmask.policy import POLICY_IDS
from vllm_dllm.unmask.walk import choose_walk

PAGE_SIZE = 16
COLUMNS = ("model", "context", "batch", "drafts", "rows", "before", "forward", "after", "wall", "host")


@dataclass(frozen=True, slots=True)
class Shape:
    """A model and how it is decoded."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    block_length: int
    is_causal: bool
    graph: str  # of its drafts


SHAPES = {
    "llada": Shape(32, 4096, 32, 32, 128, 12288, 126464, 32, is_causal=False, graph="default-static"),
    "sdar": Shape(36, 4096, 32, 8, 128, 12288, 151936, 8, is_causal=True, graph="sdar-static-8"),
    "tiny": Shape(2, 64, 2, 1, 32, 128, 512, 8, is_causal=True, graph="sdar-static-8"),
}


class Model:
    """Random weights of a transformer in bfloat16, and the K/V of some requests."""

    def __init__(self, shape: Shape, num_pages: int, device: torch.device) -> None:
        self.shape, self.device = shape, device
        h, d = shape.hidden_size, shape.head_dim
        num_qkv = (shape.num_heads + 2 * shape.num_kv_heads) * d
        sizes = ((num_qkv, h), (h, shape.num_heads * d), (2 * shape.intermediate_size, h), (h, shape.intermediate_size))
        self.layers = [[self._draw(*size) for size in sizes] for _ in range(shape.num_layers)]
        self.embedding, self.head = self._draw(shape.vocab_size, h), self._draw(shape.vocab_size, h)
        size = (num_pages, shape.num_kv_heads, PAGE_SIZE, 2 * d)
        self.kv_caches = [self._draw(*size) for _ in range(shape.num_layers)]
        self.heads = Heads(shape.num_heads, shape.num_kv_heads, d, d**-0.5, torch.bfloat16)

    def forward(self, input_ids: Tensor, plan: Plan) -> Tensor:
        """Return the hidden rows; [num_rows, hidden_size]."""
        shape = self.shape
        hidden, size = embedding(input_ids, self.embedding), (shape.hidden_size,)
        out = hidden.new_empty(len(input_ids), shape.num_heads, shape.head_dim)
        num_heads = [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads]
        for (qkv, projection, gate_up, down), kv_cache in zip(self.layers, self.kv_caches, strict=True):
            rows = linear(rms_norm(hidden, size), qkv).unflatten(1, (-1, shape.head_dim))
            plan.run(*rows.split(num_heads, 1), kv_cache, out)
            hidden = hidden + linear(out.flatten(1), projection)
            gate, up = linear(rms_norm(hidden, size), gate_up).chunk(2, -1)
            hidden = hidden + linear(silu(gate) * up, down)
        return rms_norm(hidden, size)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits; on a GPU with the float32 of their sums, as `engine.head` asks for."""
        if self.device.type == "cuda":
            return torch.mm(hidden, self.head.T, out_dtype=torch.float32)
        return linear(hidden, self.head)

    def _draw(self, *size: int) -> Tensor:
        return torch.empty(size, dtype=torch.bfloat16, device=self.device).normal_(std=size[-1] ** -0.5)


def shipped_graph(name: str) -> DraftGraph:
    """Read a graph of the package, whose files were checked; what checks others needs a library."""
    content = json.loads((Path(vllm_dllm.draft.__file__).parent / "graphs" / f"{name}.json").read_text())
    readiness = content["readiness"]
    return DraftGraph(
        tuple(tuple(sorted(map(tuple, node["formula"]))) for node in content["nodes"]),
        content["tokens_per_step"],
        tuple(node["count"] for node in content["nodes"]),
        content["num_anchors"],
        Readiness(readiness["slope"], tuple(readiness["near"]), readiness["bias"]),
        tuple(node["expected"] for node in content["nodes"]),
    ).parents_first()


class Engine:
    """Requests within their blocks, greedy, a position unmasked per step without drafts.

    Args:
        model: with `pages` for each request.
        page_table: [num_reqs, max_pages] int32.
        context: positions that are stored of each request, in a bidirectional model half of them behind the block.
        num_drafts: of each request.
    """

    def __init__(self, model: Model, page_table: Tensor, context: int, num_drafts: int) -> None:
        shape, device = model.shape, model.device
        self.model, self.page_table, self.num_drafts = model, page_table, num_drafts
        num_reqs, block_length = len(page_table), shape.block_length
        self.num_rows = num_reqs * (1 + num_drafts) * block_length
        mask = shape.vocab_size - 1
        self.state = CanvasState(num_reqs, block_length, mask, device)
        self.start = np.full(num_reqs, context if shape.is_causal else context // 2)
        self.seq_len = np.full(num_reqs, context + (1 + shape.is_causal) * block_length)
        for slot in range(num_reqs):
            self.state.add_request(slot, _params(slot, block_length, int(self.start[slot]), int(self.seq_len[slot])))
        self.state.apply_staged_writes()
        head = LogitsHead(model.logits, shape.vocab_size, mask, is_native=True)
        drafter = GraphDrafter(shipped_graph(shape.graph))
        self.denoiser = Denoiser(self.state, drafter, head, choose_walk(device), choose_settle(device))
        self.layout = CapturedLayout(
            max_num_requests=num_reqs,
            max_num_nodes=num_reqs * (1 + num_drafts),
            max_pages=page_table.shape[1],
            block_length=block_length,
            heads_per_kv=model.heads.num_heads // model.heads.num_kv_heads,
            device=device,
        )
        ids = torch.zeros(self.num_rows, dtype=torch.int32, device=device)
        self.rows, self._fill_rows = RowInputs(ids, torch.zeros_like(ids, dtype=torch.int64)), choose_rows(device)
        self.attention = CsrcAttention(model.heads, model.kv_caches[0])

    def prepare(self) -> tuple[Step, ForwardLayout]:
        """Plan the next step, and put it where the forward finds it, as the runner's hooks do."""
        num_reqs, shape, device = len(self.start), self.model.shape, self.model.device
        none = np.zeros(num_reqs, dtype=bool)
        plan = plan_step(
            KvStep(self.start, self.start, self.start, none, none, none, none, none),
            block_start=self.start,
            seq_len=self.seq_len,
            num_drafts=np.full(num_reqs, self.num_drafts),
            block_length=shape.block_length,
            kv_policy="block_causal" if shape.is_causal else "dual",
        )
        slots_np = np.arange(num_reqs)
        slots, start = torch.from_numpy(np.stack([slots_np, self.start])).to(device, non_blocking=True)
        blocks = Blocks(slots, slots_np, start)
        special = rows_to_device(plan, device)
        nodes = self.denoiser.nodes(blocks, plan.max_drafts)
        num_counted = torch.full_like(start, shape.block_length + self.num_drafts)
        step = Step(None, plan, blocks, Ledger(num_reqs, start, num_counted), special, nodes)
        known = Sequences(self.page_table)  # a plain step reads none of them
        self._fill_rows(nodes, blocks, None, known, self.rows, self.state.mask_token_id)
        layout = self.layout.fill(
            plan.layout(),
            self.page_table,
            num_rows=self.num_rows,
            page_size=PAGE_SIZE,
        )
        return step, layout

    def forward(self) -> Callable[[], Tensor]:
        """Return what runs the forward of the step that `prepare` made last: on a GPU a captured graph's replay."""
        plan = self.attention.plan(self.prepare()[1])
        hidden = self.model.forward(self.rows.input_ids, plan)
        if self.model.device.type != "cuda":
            return lambda: self.model.forward(self.rows.input_ids, plan)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            hidden = self.model.forward(self.rows.input_ids, plan)

        def replay() -> Tensor:
            graph.replay()
            return hidden

        return replay

    def decide(self, step: Step, hidden: Tensor) -> Emission:
        """Do what the sampler does behind the forward."""
        rows = hidden[step.head_rows(logit_shift=False)]
        done = self.denoiser.advance(step.blocks, step.nodes, rows)
        return self.denoiser.settle(step.blocks, step.nodes, done, step.ledger)


def _params(slot: int, block_length: int, start: int, seq_len: int) -> RequestParams:
    return RequestParams(
        policy_id=POLICY_IDS["static"],
        threshold=0.9,
        factor=1.0,
        entropy_bound=0.35,
        credit_alpha=0.7,
        credit_beta=0.8,
        credit_gamma=0.2,
        alg_temp=0.0,
        counts=(1,) * block_length,
        times=(0.0,) * block_length,
        prompt_len=start,
        seq_len=seq_len,
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        seed=slot,
    )


class Moment:
    """A point in time, on the device's stream where there is one."""

    def __init__(self, device: torch.device) -> None:
        self.host = time.perf_counter()
        self.event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        if self.event is not None:
            self.event.record()

    def until(self, later: "Moment") -> float:
        """Return the milliseconds from here."""
        if self.event is not None and later.event is not None:
            return float(self.event.elapsed_time(later.event))
        return 1e3 * (later.host - self.host)


def measure(engine: Engine, num_steps: int) -> dict[str, float]:
    """Return the medians of some steps, without the first ones, in milliseconds."""
    device, forward, found = engine.model.device, engine.forward(), []
    for _ in range(num_steps + 2 * (num_steps > 2)):
        begin = Moment(device)
        step, _layout = engine.prepare()
        prepared = Moment(device)
        hidden = forward()
        computed = Moment(device)
        emission = engine.decide(step, hidden)
        decided = Moment(device)
        emission.report.cpu(), emission.sampled.cpu(), emission.num_sampled.cpu()
        wall = 1e3 * (time.perf_counter() - begin.host)
        times = (prepared.until(computed), computed.until(decided))
        found.append((1e3 * (prepared.host - begin.host), *times, wall, wall - sum(times)))
    return dict(zip(COLUMNS[5:], np.median(np.array(found[-num_steps:]), 0).tolist(), strict=True))


def run(options: argparse.Namespace) -> None:
    """Print a row for each context, batch and number of drafts."""
    name, contexts, batches, drafts = options.model, options.contexts, options.batches, options.drafts
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = SHAPES[name]
    pages_each = -(-(max(contexts) + 2 * shape.block_length) // PAGE_SIZE)
    model = Model(shape, max(batches) * pages_each + 1, device)
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|", flush=True)
    for context in contexts:
        for batch in batches:
            pages = 1 + torch.randperm(batch * pages_each, device=device).view(batch, pages_each).int()
            pages = pad(pages, (0, max(0, options.max_model_len // PAGE_SIZE - pages_each)))
            for num_drafts in drafts:
                engine = Engine(model, pages, context, num_drafts)
                found = measure(engine, options.steps)
                row = [name, context, batch, num_drafts, engine.num_rows, *(f"{ms:.3f}" for ms in found.values())]
                print(f"| {' | '.join(map(str, row))} |", flush=True)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def numbers(text: str) -> list[int]:
        return [int(word) for word in text.split(",")]

    parser.add_argument("model", choices=SHAPES)
    parser.add_argument("--contexts", type=numbers, default=[1024, 4096])
    parser.add_argument("--batches", type=numbers, default=[1, 4, 16])
    parser.add_argument("--drafts", type=numbers, default=[0, 3, 5, 8])
    parser.add_argument("--max-model-len", type=int, default=8192, help="of the server: how wide page tables are")
    parser.add_argument("--steps", type=int, default=30, help="measured of each")
    options = parser.parse_args()
    with torch.inference_mode():
        run(options)


if __name__ == "__main__":
    main()
