"""Attention and stores at real shapes, compared with the rule in float64: eagerly, and as a captured CUDA graph.

    python scripts/gpu_shapes.py [HEADS,KV_HEADS,BLOCK,DRAFTS,REQUESTS,CONTEXT ...]

The graph is captured with a layout of no requests and with tables for 16,384 positions, and replayed with another one
and other places to store. Needs torch and the built ops, nothing else. On a CPU the same calls have no graph.
Exit status 1 where anything differs.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from vllm_dllm.attention.csrc import CsrcAttention
from vllm_dllm.attention.layout import CapturedLayout, HostLayout, PagedIndex, denoise_layout, empty_layout
from vllm_dllm.attention.store import store_kv
from vllm_dllm.self_test.attention import ALLOWED, AttentionShape, Scene
from vllm_dllm.self_test.check import row_error

MAX_LEN, PAGE_SIZE = 16_384, 16


@dataclass(frozen=True, slots=True)
class Step:
    """A denoising step of an 8B model in bfloat16; a block as long as a sequence without context is a refresh."""

    num_heads: int
    num_kv_heads: int
    block_length: int
    num_drafts: int
    num_requests: int
    context_len: int

    @property
    def shape(self) -> AttentionShape:
        """Return the shape of the model."""
        dtype = torch.bfloat16
        return AttentionShape(
            self.num_heads, self.num_kv_heads, 128, dtype, dtype, PAGE_SIZE, self.block_length, max_len=MAX_LEN
        )

    @property
    def layout(self) -> HostLayout:
        """Return who sees whom: the block is in the middle of what is stored."""
        start = np.full(self.num_requests, self.context_len // 2)
        end = np.full_like(start, self.context_len + self.block_length)
        return denoise_layout(start, end, num_nodes=1 + self.num_drafts, block_length=self.block_length)


STEPS = (
    Step(32, 32, 32, 0, 1, 1024),
    Step(32, 32, 32, 5, 1, 4096),
    Step(32, 32, 32, 3, 16, 1024),
    Step(32, 8, 4, 10, 4, 4096),
    Step(32, 8, 8, 0, 64, 1024),
    Step(28, 4, 32, 3, 2, 1024),
    Step(32, 32, 2048, 0, 1, 0),
)


def on_device(call: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Return what replays a call: a captured graph on a GPU, the call itself elsewhere."""
    call()
    if device.type != "cuda":
        return call
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def replayed(step: Step, scene: Scene, out: Tensor, stored: Tensor) -> float:
    """Attend and store by a graph that was captured with another step; returns how much of what it stored differs.

    The first rows of each request, a block of them, are stored at the block's positions, those of drafts nowhere.

    Args:
        step: what is replayed.
        scene: its rows and pages.
        out: written by the graph.
        stored: a cache as the scene's, written by the graph.
    """
    host, device, num_rows = scene.host, out.device, len(out)
    wide = pad(scene.page_table, (0, -(-MAX_LEN // PAGE_SIZE) - scene.page_table.shape[1]))
    captured = CapturedLayout(
        max_num_requests=step.num_requests,
        max_num_nodes=host.num_nodes,
        max_pages=wide.shape[1],
        block_length=step.block_length,
        heads_per_kv=step.num_heads // step.num_kv_heads,
        device=device,
    )
    sizes = {"num_rows": num_rows, "page_size": PAGE_SIZE}
    plan = CsrcAttention(step.shape.heads, stored).plan(captured.fill(empty_layout(), wide[:0], **sizes))
    index = PagedIndex(*(torch.zeros(num_rows, dtype=torch.int64, device=device) for _ in range(2)))

    def call() -> None:
        store_kv(scene.key, scene.value, stored, index)
        plan.run(scene.query, scene.key, scene.value, stored, out)

    replay = on_device(call, device)
    captured.fill(host, wide, **sizes)
    position = step.context_len // 2 + torch.arange(step.block_length, device=device)
    page = wide[:, position // PAGE_SIZE].long()
    index.page.view(step.num_requests, -1)[:, : step.block_length] = page
    index.offset.view(step.num_requests, -1)[:, : step.block_length] = position % PAGE_SIZE
    out.fill_(torch.nan)
    replay()
    rows = torch.cat([scene.key, scene.value], -1).view(step.num_requests, -1, *stored.shape[1::2])
    found = stored[page, :, position % PAGE_SIZE]
    return float((found != rows[:, : step.block_length]).double().mean())


def errors(step: Step, device: torch.device) -> dict[str, float]:
    """Return the errors of a step, by what was done."""
    scene = Scene(step.shape, step.layout, device)
    expected = scene.expected()
    found = {"eager": row_error(scene.attend(CsrcAttention), expected)}
    out = torch.full_like(scene.query, torch.nan)
    found["stored"] = replayed(step, scene, out, scene.kv_cache.clone())
    found["captured"] = row_error(out, expected)
    return found


def main(arguments: list[str]) -> int:
    """Compare each step; returns the exit status."""
    device, num_wrong = torch.device("cuda" if torch.cuda.is_available() else "cpu"), 0
    steps = [Step(*map(int, each.split(","))) for each in arguments] or STEPS
    for step in steps:
        for name, error in errors(step, device).items():
            allowed = 0.0 if name == "stored" else ALLOWED[torch.bfloat16]
            num_wrong += not error <= allowed
            print(
                f"{'ok   ' if error <= allowed else 'WRONG'} {step} {name}: {error:.2e}, allowed {allowed}", flush=True
            )
    return int(num_wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
