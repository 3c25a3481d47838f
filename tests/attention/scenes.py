"""Forwards to attend in: layouts, rows, a cache that is poison wherever nothing may be read, and the exact result."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from vllm_dllm.attention.interface import Attention, Heads
from vllm_dllm.attention.layout import (
    CapturedLayout,
    ForwardLayout,
    HostLayout,
    denoise_layout,
    forward_layout,
    host_layout,
)

PAGE_SIZE = 16
HEAD_DIM = 32
SCALE = 0.3
NOWHERE = 1 << 20
"""A page that no cache has, where a page table means nothing."""


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def denoising(num_nodes: int, block_length: int = 5) -> HostLayout:
    return denoise_layout(ints(1, 33, 16, 47), ints(6, 70, 21, 90), num_nodes=num_nodes, block_length=block_length)


def committing() -> HostLayout:
    """Requests of a block-causal model, two of which store the block before, and one looks ahead."""
    roots = [[0, start, start + 5, start + 5] for start in (5, 35, 0, 40)]
    context = [roots[0], [0, 0, 5, 5], *[roots[1]] * 3, roots[2], roots[2], [0, 5, 10, 10], roots[3], [0, 35, 40, 40]]
    return host_layout(ints(2, 3, 3, 2), np.full(10, 5), np.array(context))


def storing(begin: np.ndarray, end: np.ndarray) -> HostLayout:
    """One long node of each request, which sees what is before it."""
    return host_layout(np.ones_like(begin), end - begin, np.stack([np.zeros_like(begin), begin, end, end], 1))


def prefilling() -> HostLayout:
    """Blocks of prompts, then of one request its first canvas."""
    own = [(0, 4), (4, 8), (8, 12), (16, 20), (20, 24), (24, 28), (40, 44)]
    return host_layout(ints(3, 3, 0, 1), np.full(7, 4), np.array([[0, begin, end, end] for begin, end in own]))


def mixed() -> HostLayout:
    """Nodes of any length and context, an empty node, an empty request, a request whose nodes differ."""
    context = [[0, 33, 40, 41], [0, 33, 40, 41], [3, 20, 20, 20], [0, 9, 9, 9], [0, 0, 17, 50], [0, 0, 0, 0]]
    return host_layout(ints(2, 0, 3, 1), ints(7, 1, 3, 0, 3, 13), np.array(context))


def causal(*which: int) -> HostLayout:
    """The nodes of `mixed`, some of them causal."""
    host = mixed()
    return host_layout(np.diff(host.first_node), host.own_len, host.context, np.isin(np.arange(host.num_nodes), which))


LAYOUTS = {
    "one canvas": denoising(1),
    "drafts": denoising(3, 4),
    "drafts and commits": committing(),
    "whole rows": storing(ints(0, 0), ints(21, 40)),
    "ends of rows": storing(ints(0, 17, 32), ints(9, 33, 53)),
    "prompts": prefilling(),
    "a refresh beside drafts": host_layout(
        ints(1, 3), ints(40, 5, 5, 5), np.array([[0, 0, 40, 40], *[[0, 33, 38, 70]] * 3])
    ),
    "mixed": mixed(),
    "causal": causal(0, 1, 2, 3, 4, 5),
    "some causal": causal(0, 4, 5),
    "a causal prefill beside blocks": host_layout(
        ints(1, 2), ints(70, 9, 9), np.array([[0, 3, 3, 3], *[[0, 33, 33, 33]] * 2]), np.array([True, False, False])
    ),
}


@dataclass(frozen=True, slots=True)
class Scene:
    """All that attention takes, and the heads."""

    heads: Heads
    layout: ForwardLayout
    query: Tensor
    key: Tensor
    value: Tensor
    kv_cache: Tensor

    def attend(self, implementation: type[Attention]) -> Tensor:
        """Run an implementation into a poisoned output."""
        out = torch.full_like(self.query, torch.nan)
        plan = implementation(self.heads, self.kv_cache).plan(self.layout)
        plan.run(self.query, self.key, self.value, self.kv_cache, out)
        return out

    def expected(self, dtype: torch.dtype) -> Tensor:
        """Attend node by node, as the rule is written, in some dtype."""
        host, out = self.layout.host, torch.empty_like(self.query, dtype=dtype)
        for request in range(host.num_requests):
            for node in range(host.first_node[request], host.first_node[request + 1]):
                rows = slice(host.first_row[node], host.first_row[node + 1])
                begin0, end0, begin1, end1 = host.context[node]
                position = torch.cat([torch.arange(begin0, end0), torch.arange(begin1, end1)])
                page = self.layout.page_table[request, position // PAGE_SIZE].long()
                stored = self.kv_cache[page, :, position % PAGE_SIZE]
                key = torch.cat([stored[..., :HEAD_DIM], self.key[rows]]).to(dtype)
                value = torch.cat([stored[..., HEAD_DIM:], self.value[rows]]).to(dtype)
                out[rows] = dense(self.query[rows].to(dtype), key, value, is_causal=bool(host.is_causal[node]))
        return out


def dense(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool) -> Tensor:
    """Attend from all rows to all keys; if causal, of the last ones, the rows' own, to those up to the row."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * SCALE
    if is_causal:
        num_rows, num_keys = scores.shape[1:]
        scores.masked_fill_(torch.ones(num_rows, num_keys).bool().triu(num_keys - num_rows + 1), -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value)


def make_scene(
    host: HostLayout,
    *,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    is_position_major: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Scene:
    """Draw rows and the stored positions that a layout needs, in shuffled pages."""
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    heads = Heads(num_heads, num_kv_heads, HEAD_DIM, SCALE, dtype)
    table, num_pages = _page_table(host, generator)
    shape = (num_pages, num_kv_heads, PAGE_SIZE, 2 * HEAD_DIM)
    kv_cache = torch.full(shape, torch.nan, device=device, dtype=dtype)
    if is_position_major:
        kv_cache = kv_cache.transpose(1, 2).contiguous().transpose(1, 2)
    request = np.arange(host.num_requests).repeat(np.diff(host.first_node))
    for r, (begin0, end0, begin1, end1) in zip(request, host.context, strict=True):
        position = torch.cat([torch.arange(begin0, end0), torch.arange(begin1, end1)])
        page = table[r, position // PAGE_SIZE].long()
        kv_cache[page, :, position % PAGE_SIZE] = draw(len(position), num_kv_heads, 2 * HEAD_DIM)
    num_rows = int(host.first_row[-1])
    rows = draw(num_rows, num_heads + 2 * num_kv_heads, HEAD_DIM)  # strided, as the projection's output is
    query, key, value = rows.split([num_heads, num_kv_heads, num_kv_heads], 1)
    return Scene(
        heads, forward_layout(host, table.to(device), PAGE_SIZE, num_heads // num_kv_heads), query, key, value, kv_cache
    )


def captured(scene: Scene, *, num_rows: int, block_length: int, max_num_requests: int) -> Scene:
    """Pad a denoising step to a captured shape; the padding's rows are new."""
    buffers = CapturedLayout(
        max_num_requests=max_num_requests,
        max_num_nodes=num_rows // block_length + 2,
        max_pages=scene.layout.page_table.shape[1],
        block_length=block_length,
        heads_per_kv=scene.heads.num_heads // scene.heads.num_kv_heads,
        device=scene.query.device,
    )
    layout = buffers.fill(
        scene.layout.host,
        scene.layout.page_table,
        num_rows=num_rows,
        page_size=PAGE_SIZE,
    )
    more = num_rows - len(scene.query)
    rows = [torch.cat([part, torch.randn_like(part[:1]).repeat(more, 1, 1)]) for part in (scene.query, scene.key)]
    value = torch.cat([scene.value, torch.randn_like(scene.value[:1]).repeat(more, 1, 1)])
    return replace(scene, layout=layout, query=rows[0], key=rows[1], value=value)


def _page_table(host: HostLayout, generator: torch.Generator) -> tuple[Tensor, int]:
    """Give each request shuffled pages for the positions that it needs, and pages that do not exist for the rest."""
    ends = host.context.max(1, initial=0)
    length = [ends[a:b].max(initial=0) for a, b in zip(host.first_node, host.first_node[1:], strict=False)]
    width = -(-int(max(length, default=0)) // PAGE_SIZE) + 2
    table = torch.full((host.num_requests, width), NOWHERE, dtype=torch.int32)
    shuffled = torch.randperm(host.num_requests * width + 3, generator=generator).int()
    for r in range(host.num_requests):
        for node in range(host.first_node[r], host.first_node[r + 1]):
            begin0, end0, begin1, end1 = host.context[node]
            for position in [*range(begin0, end0), *range(begin1, end1)]:
                table[r, position // PAGE_SIZE] = shuffled[r * width + position // PAGE_SIZE]
    return table, len(shuffled)


def assert_near(out: Tensor, scene: Scene) -> None:
    """Compare with the exact result: at most twice the error of dense attention in the same dtype, and a rounding."""
    exact = scene.expected(torch.float64)
    plain_error = (scene.expected(scene.query.dtype) - exact).abs().max() if out.numel() else 0.0
    floor = torch.finfo(out.dtype).eps * exact.abs().max() if out.numel() else 0.0
    error = (out - exact).abs()
    assert not error.isnan().any(), "a place was not written, or something was read that may not be"
    assert bool((error <= 2 * plain_error + floor).all()), f"{error.max()} > 2 * {plain_error} + {floor}"
