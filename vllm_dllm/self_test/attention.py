"""An implementation of attention against the rule in float64, over pages that hold NaN wherever nothing may be read."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vllm_dllm.attention.interface import Attention, Heads
from vllm_dllm.attention.layout import (
    CapturedLayout,
    HostLayout,
    PagedIndex,
    empty_layout,
    forward_layout,
    host_layout,
    pad_layout,
)
from vllm_dllm.attention.store import store_kv
from vllm_dllm.self_test.check import Check, row_error

ALLOWED = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
"""Of each row's error, by the model's dtype: some roundings of its inputs and outputs."""

CONTEXTS = (19, 300, 2100)
"""Stored positions that canvases see: less than a page or two, some pages, more than a split of the context."""

LONGEST_SEGMENT = 200
"""Rows of the segment that sees nothing stored, as a refresh."""


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What of a server decides how its attention is computed; of one rank."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    kv_dtype: torch.dtype  # of the cache
    page_size: int
    block_length: int
    max_len: int  # positions of a request, at most

    @property
    def heads(self) -> Heads:
        """What implementations are made for."""
        return Heads(self.num_heads, self.num_kv_heads, self.head_dim, self.head_dim**-0.5, self.dtype)


def step_layout(shape: AttentionShape) -> HostLayout:
    """Lay out a step of everything: a refresh, one whose rows see each other causally, and `blocks_layout`."""
    longest = min(LONGEST_SEGMENT, shape.max_len)
    blocks = blocks_layout(shape)
    return host_layout(
        np.concatenate([[1, 1], np.diff(blocks.first_node)]),
        np.concatenate([[longest, longest], blocks.own_len]),
        np.concatenate([np.zeros((2, 4), dtype=np.int32), blocks.context]),
        np.concatenate([[0, 1], blocks.is_causal]) > 0,
    )


def blocks_layout(shape: AttentionShape) -> HostLayout:
    """Lay out a step of blocks alone: for each length of the context a request with drafts.

    Every other one of these sees nothing behind its block, as in a block-causal model, and has the block before to
    commit. Of the others the last node's rows see each other causally.
    """
    block_length = shape.block_length
    context: list[list[int]] = []
    is_causal, num_nodes = [], []
    room = shape.max_len - block_length
    for number, length in enumerate(sorted({min(length, room) for length in CONTEXTS if room > 0})):
        start = length if number % 2 else length // 2
        nodes = [[0, start, start + block_length, length + block_length]] * (2 + number)
        if number % 2 and start >= block_length:
            nodes.append([0, start - block_length, start, start])
        context += nodes
        is_causal += [False] * (len(nodes) - 1) + [number % 2 == 0]
        num_nodes.append(len(nodes))
    own_len = np.full(len(context), block_length)
    return host_layout(
        np.array(num_nodes, dtype=np.int64), own_len, np.array(context).reshape(-1, 4), np.array(is_causal)
    )


def block_layout(shape: AttentionShape) -> HostLayout:
    """Lay out one request's block alone, behind the longest context: so few rows that a GPU divides the context."""
    start = min(max(CONTEXTS), max(0, shape.max_len - shape.block_length))
    end = start + shape.block_length
    return host_layout(np.ones(1, dtype=np.int64), np.array([shape.block_length]), np.array([[0, start, end, end]]))


class Scene:
    """Rows and stored positions of a layout.

    Args:
        shape: of the model.
        host: who sees whom.
        device: where everything is.
    """

    def __init__(self, shape: AttentionShape, host: HostLayout, device: torch.device) -> None:
        self.shape, self.host = shape, host
        generator = torch.Generator(device).manual_seed(1)

        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device, dtype=torch.float32).to(shape.dtype)

        num_rows = int(host.first_row[-1])
        num_q, num_kv = shape.num_heads, shape.num_kv_heads
        rows = draw(num_rows, num_q + 2 * num_kv, shape.head_dim)  # strided, as the projection's output is
        self.query, self.key, self.value = rows.split([num_q, num_kv, num_kv], 1)
        ends = _per_request(host)
        self.stored = [draw(end, 2 * num_kv, shape.head_dim) for end in ends]
        self.kv_cache, self.page_table = self._pages(ends, generator, device)

    def _pages(self, ends: list[int], generator: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor]:
        """Store what requests have stored, in shuffled pages; all else is NaN, and so is the whole of page 0."""
        shape = self.shape
        num_pages = [-(-end // shape.page_size) for end in ends]
        size = (1 + sum(num_pages), shape.num_kv_heads, shape.page_size, 2 * shape.head_dim)
        kv_cache = torch.full(size, torch.nan, device=device).to(shape.kv_dtype)
        page_table = torch.zeros(len(ends), max([1, *num_pages]), dtype=torch.int32, device=device)
        shuffled = 1 + torch.randperm(sum(num_pages), generator=generator, device=device).int()
        for request, pages in enumerate(shuffled.split(num_pages)):
            page_table[request, : len(pages)] = pages
        for request, stored in enumerate(self.stored):
            position = torch.arange(len(stored), device=device)
            page = page_table[request, position // shape.page_size].long()
            key, value = stored.chunk(2, 1)
            store_kv(key, value, kv_cache, PagedIndex(page, position % shape.page_size))
        return kv_cache, page_table

    def attend(self, implementation: type[Attention]) -> Tensor:
        """Run an implementation; what it does not write is NaN."""
        out = torch.full_like(self.query, torch.nan)
        layout = forward_layout(
            self.host, self.page_table, self.shape.page_size, self.shape.num_heads // self.shape.num_kv_heads
        )
        plan = implementation(self.shape.heads, self.kv_cache).plan(layout)
        plan.run(self.query, self.key, self.value, self.kv_cache, out)
        return out

    def expected(self) -> Tensor:
        """Attend node by node, as the rule is written, in float64; the layout's rows."""
        host, shape = self.host, self.shape
        exact = torch.zeros_like(self.query, dtype=torch.float64)
        for request in range(host.num_requests):
            seen = self.stored[request].to(shape.kv_dtype).double()
            for node in range(host.first_node[request], host.first_node[request + 1]):
                rows = slice(int(host.first_row[node]), int(host.first_row[node + 1]))
                begin0, end0, begin1, end1 = host.context[node].tolist()
                own = torch.cat([self.key[rows], self.value[rows]], 1).double()
                key, value = torch.cat([seen[begin0:end0], seen[begin1:end1], own]).chunk(2, 1)
                query, is_causal = self.query[rows].double(), bool(host.is_causal[node])
                exact[rows] = _dense(query, key, value, shape.heads.scale, is_causal=is_causal)
        return exact


def check_attention(name: str, implementation: type[Attention], shape: AttentionShape, device: torch.device) -> Check:
    """Compare an implementation with the rule, in a step that has everything and in one of a block alone.

    One that may be captured is compared as a captured CUDA graph has it, too.
    """
    scenes = [Scene(shape, layout(shape), device) for layout in (step_layout, block_layout)]
    errors = [row_error(scene.attend(implementation), scene.expected()) for scene in scenes]
    if implementation.support.cuda_graphs:
        errors.append(_captured_error(implementation, shape, device))
    error = max(errors, key=lambda error: (error != error, error))  # NaN is larger than any
    case = (
        f"{shape.num_heads}/{shape.num_kv_heads} heads of {shape.head_dim}, pages of {shape.page_size}, blocks of "
        f"{shape.block_length}, contexts up to {max(int(scene.host.context_len.max()) for scene in scenes)}"
    )
    return Check(f"attention {name}", case, error, ALLOWED[shape.dtype])


def _captured_error(implementation: type[Attention], shape: AttentionShape, device: torch.device) -> float:
    """Capture a step of nobody, as an engine does, and replay it with the rows and the layout of another one.

    That one is padded: the last requests are nobody's, and the rows of two blocks.
    """
    host, block_length = blocks_layout(shape), shape.block_length
    num_rows = int(host.first_row[-1]) + 2 * block_length
    max_num_requests = host.num_requests + 1
    num_requests = min(num_rows // block_length, max_num_requests) + 1
    padded = pad_layout(host, num_rows=num_rows, num_requests=num_requests, block_length=block_length)
    scene = Scene(shape, padded, device)
    buffers = CapturedLayout(
        max_num_requests=max_num_requests,
        max_num_nodes=num_rows // block_length,
        max_pages=scene.page_table.shape[1],
        block_length=block_length,
        heads_per_kv=shape.num_heads // shape.num_kv_heads,
        device=device,
    )
    nobody = buffers.fill(empty_layout(), scene.page_table[:0], num_rows=num_rows, page_size=shape.page_size)
    plan = implementation(shape.heads, scene.kv_cache).plan(nobody)
    out = torch.full_like(scene.query, torch.nan)
    replay = _captured(lambda: plan.run(scene.query, scene.key, scene.value, scene.kv_cache, out), device)
    buffers.fill(host, scene.page_table[: host.num_requests], num_rows=num_rows, page_size=shape.page_size)
    out.fill_(torch.nan)
    replay()
    return row_error(out, scene.expected())


def _captured(run: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Capture a call in a CUDA graph; on a CPU it is its own replay, which finds what the tensors hold by then."""
    if device.type == "cpu":
        return run
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what is loaded at the first call may not be within a capture
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
    return graph.replay


def _per_request(host: HostLayout) -> list[int]:
    """Return up to where each request's stored positions are seen."""
    ends = host.context.max(1, initial=0)
    return [int(ends[a:b].max(initial=0)) for a, b in zip(host.first_node, host.first_node[1:], strict=False)]


def _dense(query: Tensor, key: Tensor, value: Tensor, scale: float, *, is_causal: bool) -> Tensor:
    """Attend from all rows to all keys, of which the last are their own; [num_rows, num_heads, head_dim]."""
    group = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(group, 1).transpose(0, 1) for each in (key, value))
    scores = (query.transpose(0, 1) @ key.transpose(1, 2)) * scale
    if is_causal:
        own = scores[:, :, -len(query) :]
        own.masked_fill_(torch.ones_like(own, dtype=torch.bool).triu(1), -torch.inf)
    return (scores.softmax(-1) @ value).transpose(0, 1)
