"""Attention of a step's nodes: our kernel against what does the same on this machine."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.kernels.floor import Rates
from benchmarks.kernels.turns import UnequalResultsError, num_data_sets
from vllm_dllm.attention.csrc import CsrcAttention
from vllm_dllm.attention.flashinfer import FlashInferAttention
from vllm_dllm.attention.interface import Attention, Heads, Plan, Setting
from vllm_dllm.attention.layout import denoise_layout, forward_layout
from vllm_dllm.attention.plain import PlainAttention
from vllm_dllm.attention.xformers import XformersAttention

IMPLEMENTATIONS: dict[str, type[Attention]] = {
    "csrc": CsrcAttention,
    "gather + SDPA": PlainAttention,
    "FlashInfer": FlashInferAttention,
    "xFormers": XformersAttention,
}

PAGE_SIZE = 32  # vLLM's CPU attention takes multiples of it

Attend = Callable[[int], Tensor]
"""Attention to the K/V of the given data set; [num_rows, num_heads, head_dim]."""


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """A denoising step: each request has a block in the middle of its stored sequence, and drafts of it."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    context_len: int  # stored positions that a node sees, a multiple of PAGE_SIZE
    block_length: int
    num_drafts: int
    num_requests: int

    @property
    def num_nodes(self) -> int:
        """Nodes of all requests, the roots included."""
        return self.num_requests * (1 + self.num_drafts)

    @property
    def num_rows(self) -> int:
        """Rows of all nodes."""
        return self.num_nodes * self.block_length

    @property
    def context_bytes(self) -> int:
        """Bytes of the stored keys and values that all requests see."""
        return self.num_requests * self.context_len * self.num_kv_heads * 2 * self.head_dim * self.dtype.itemsize

    def floor_ms(self, rates: Rates) -> float:
        """Return the time that reading everything once, or the two products of each row, takes at best."""
        per_row = 2 * (self.num_heads + self.num_kv_heads) * self.head_dim * self.dtype.itemsize
        num_seen = self.num_rows * (self.context_len + self.block_length)
        return rates.floor_ms(
            self.context_bytes + self.num_rows * per_row, 4.0 * self.head_dim * self.num_heads * num_seen
        )


class AttentionProblem:
    """Data of a shape: rows, and `num_sets` sets of stored keys and values in pages in random order."""

    def __init__(self, shape: AttentionShape, device: torch.device) -> None:
        self.shape, self.device = shape, device
        self.num_sets = num_data_sets(shape.context_bytes)
        self.scale = shape.head_dim**-0.5
        randn = partial(torch.randn, device=device, dtype=shape.dtype)
        self.query = randn(shape.num_rows, shape.num_heads, shape.head_dim)
        self.key, self.value = randn(2, shape.num_rows, shape.num_kv_heads, shape.head_dim)
        self.block_start = shape.context_len // 2
        self.seq_len = shape.context_len + shape.block_length
        pages_per_request = -(-self.seq_len // PAGE_SIZE)
        num_pages = self.num_sets * shape.num_requests * pages_per_request
        self.kv_cache = randn(num_pages, shape.num_kv_heads, PAGE_SIZE, 2 * shape.head_dim)
        order = torch.randperm(num_pages, device=device).int()
        self.page_tables = order.view(self.num_sets, shape.num_requests, pages_per_request)
        context = torch.arange(shape.context_len, device=device)
        self.positions = torch.where(context < self.block_start, context, context + shape.block_length)

    def gather(self, number: int) -> Tensor:
        """Copy what the requests see; [num_requests, context_len, num_kv_heads, 2 * head_dim]."""
        page = self.page_tables[number][:, self.positions // PAGE_SIZE].long()
        return self.kv_cache[page, :, self.positions % PAGE_SIZE]

    def by_node(self, rows: Tensor) -> Tensor:
        """View rows as [num_nodes, block_length, ...]."""
        return rows.view(self.shape.num_nodes, self.shape.block_length, *rows.shape[1:])


def contestants(problem: AttentionProblem) -> dict[str, Attend]:
    """Return who can work on a problem here, our kernel first, after comparing their results.

    Raises: UnequalResultsError.
    """
    found = {name: _ours(problem, each) for name, each in IMPLEMENTATIONS.items() if _works(problem, each)}
    if problem.device.type == "cpu" and find_spec("vllm"):
        found["vLLM"] = _vllm_cpu(problem)
    elif problem.device.type == "cuda":
        found["flex_attention"] = _flex_attention(problem)
        if problem.shape.dtype != torch.float32:
            found["FlashAttention, gathered before"] = _flash(problem)
    expected = found["csrc"](0).float()
    # A score sums head_dim products: rounding errors add up like a random walk, taken here at four deviations.
    eps = torch.finfo(problem.shape.dtype).eps
    tolerance = 4 * math.sqrt(problem.shape.head_dim) * eps * float(expected.abs().max())
    for name, attend in found.items():
        error = float((attend(0).float() - expected).abs().max())
        if not error <= tolerance:
            raise UnequalResultsError(f"{problem.shape}: {name} and csrc differ by {error:.2g}, not {tolerance:.2g}")
    return found


def _works(problem: AttentionProblem, implementation: type[Attention]) -> bool:
    shape, device = problem.shape, problem.device
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    setting = Setting(device.type, capability, shape.dtype, shape.dtype, shape.head_dim, PAGE_SIZE)
    return implementation.support.refusal(setting) is None and implementation.unavailable(setting) is None


def plans(problem: AttentionProblem, implementation: type[Attention]) -> list[Plan]:
    """Prepare an implementation of the package for the forward, with each data set."""
    shape = problem.shape
    heads = Heads(shape.num_heads, shape.num_kv_heads, shape.head_dim, problem.scale, shape.dtype)
    block_start = np.full(shape.num_requests, problem.block_start)
    host = denoise_layout(
        block_start,
        np.full_like(block_start, problem.seq_len),
        num_nodes=1 + shape.num_drafts,
        block_length=shape.block_length,
    )
    # One of each per data set: a library's plan ends when the next one is made.
    return [
        implementation(heads, problem.kv_cache).plan(
            forward_layout(host, page_table, PAGE_SIZE, shape.num_heads // shape.num_kv_heads)
        )
        for page_table in problem.page_tables
    ]


def _ours(problem: AttentionProblem, implementation: type[Attention]) -> Attend:
    """An implementation of the package; preparing a forward, which all layers share, is not timed."""
    prepared = plans(problem, implementation)
    out = torch.empty_like(problem.query)

    def attend(number: int) -> Tensor:
        prepared[number].run(problem.query, problem.key, problem.value, problem.kv_cache, out)
        return out

    return attend


def _flash(problem: AttentionProblem) -> Attend:
    """FlashAttention of torch on keys and values that somebody gathered for each node: less work than ours."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    query = problem.by_node(problem.query).transpose(1, 2)
    key_value = []
    for number in range(problem.num_sets):
        stored = problem.gather(number).repeat_interleave(1 + problem.shape.num_drafts, 0)
        own = problem.by_node(torch.cat([problem.key, problem.value], dim=-1))
        key_value.append(torch.cat([stored, own], dim=1).transpose(1, 2).contiguous().chunk(2, dim=-1))

    def attend(number: int) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            key, value = key_value[number]
            result = scaled_dot_product_attention(query, key, value, scale=problem.scale, enable_gqa=True)
        return result.transpose(1, 2).flatten(0, 1)

    return attend


def _flex_attention(problem: AttentionProblem) -> Attend:
    """All nodes of a request at once, masked; gathered within the turn."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    shape = problem.shape
    num_own = (1 + shape.num_drafts) * shape.block_length

    def is_visible(_request: Tensor, _head: Tensor, row: Tensor, seen: Tensor) -> Tensor:
        node = (seen - shape.context_len) // shape.block_length
        return (seen < shape.context_len) | (row // shape.block_length == node)

    mask = create_block_mask(is_visible, None, None, num_own, shape.context_len + num_own, device=problem.device)
    compiled = torch.compile(flex_attention)
    own_key_value = torch.cat([problem.key, problem.value], dim=-1).view(
        shape.num_requests, num_own, *problem.key.shape[1:-1], -1
    )
    query = problem.query.view(shape.num_requests, num_own, shape.num_heads, shape.head_dim).transpose(1, 2)

    def attend(number: int) -> Tensor:
        key, value = torch.cat([problem.gather(number), own_key_value], dim=1).transpose(1, 2).chunk(2, dim=-1)
        result = compiled(query, key, value, block_mask=mask, scale=problem.scale, enable_gqa=True)
        return result.transpose(1, 2).flatten(0, 1)

    return attend


def _vllm_cpu(problem: AttentionProblem) -> Attend:
    """vLLM's own kernel with a sequence for each node; the nodes of a request share the pages of its context.

    It takes its rows' keys and values from the cache. Storing them, each step and layer anew, is not timed.
    """
    from benchmarks.kernels.vllm_attention import VllmCpuAttention

    return VllmCpuAttention(problem).attend
