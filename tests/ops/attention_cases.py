"""Calls of `draft_graph_attention`, what plain torch makes of them, and how far an implementation may be from it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vllm_dllm.attention.layout import HostLayout
from vllm_dllm.attention.tiles import query_tiles

Interval = tuple[int, int]
Node = tuple[int, Sequence[Interval]] | tuple[int, Sequence[Interval], bool]
"""How many rows, the stored positions they see, in one or two intervals, and whether it is causal."""

Nodes = Sequence[Node]
"""The nodes of a request."""

EXPONENT_ERROR = 2**-22
"""Relative error of 2^x: 2 ulp of CUDA's exp2f, as its programming guide says; 2e-7 on a CPU (csrc/cpu/simd/vec.h)."""

MMA_DEPTH = 16
"""Products that a tensor core's instruction adds up at once, in an order and with a truncation of its own."""


@dataclass(frozen=True, slots=True)
class Heads:
    """The shape of a layer."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int


@dataclass(frozen=True, slots=True)
class Case:
    """The tensors of one call, as the op takes them."""

    query: Tensor
    key: Tensor
    value: Tensor
    kv_cache: Tensor
    page_table: Tensor
    first_node: Tensor
    first_row: Tensor
    context: Tensor
    is_causal: Tensor
    scale: float

    @property
    def page_size(self) -> int:
        return self.kv_cache.shape[2]

    def to(self, device: str) -> "Case":
        moved = {name: getattr(self, name).to(device) for name in self.__slots__ if name != "scale"}
        return replace(self, **moved)

    def with_garbage(self) -> "Case":
        """NaN in every place of the cache that no row sees, nonsense in every entry of the page table without need."""
        is_seen = torch.zeros(self.kv_cache.shape[0], self.page_size, dtype=torch.bool)
        is_needed = torch.zeros_like(self.page_table, dtype=torch.bool)
        for request, first, end in self.requests():
            for node in range(first, end):
                positions = self.visible(node)
                pages = positions // self.page_size
                is_needed[request, pages] = True
                is_seen[self.page_table[request, pages].long(), positions % self.page_size] = True
        cache = self.kv_cache.clone(memory_format=torch.preserve_format)
        cache.masked_fill_(~is_seen[:, None, :, None], float("nan"))
        return replace(self, kv_cache=cache, page_table=self.page_table.masked_fill(~is_needed, -(2**31)))

    def requests(self) -> list[tuple[int, int, int]]:
        """(request, first node, end of its nodes)."""
        return [(request, *nodes) for request, nodes in enumerate(pairwise(self.first_node.tolist()))]

    def rows(self, node: int) -> slice:
        first, end = self.first_row[node : node + 2].tolist()
        return slice(first, end)

    def visible(self, node: int) -> Tensor:
        """Stored positions that a node sees, [n] int64, ascending; none if it has no rows."""
        if self.rows(node).start == self.rows(node).stop:
            return torch.empty(0, dtype=torch.int64)
        begin0, end0, begin1, end1 = self.context[node].tolist()
        positions = [torch.arange(begin0, max(begin0, end0)), torch.arange(begin1, max(begin1, end1))]
        return torch.cat(positions)

    def select(self, request: int, node: int) -> "Case":
        """One node alone, in a call of its own."""
        rows = self.rows(node)
        return replace(
            self,
            query=self.query[rows],
            key=self.key[rows],
            value=self.value[rows],
            page_table=self.page_table[request : request + 1],
            first_node=torch.tensor([0, 1], dtype=torch.int32),
            first_row=torch.tensor([0, rows.stop - rows.start], dtype=torch.int32),
            context=self.context[node : node + 1],
            is_causal=self.is_causal[node : node + 1],
        )


def make_case(heads: Heads, requests: Sequence[Nodes], dtype: torch.dtype, *, layout: str = "HND") -> Case:
    """Make a call with random numbers.

    Args:
        heads: shape of the layer.
        requests: the nodes of each request.
        dtype: of all numbers.
        layout: of the cache in memory: "HND" [pages, heads, positions, numbers] or "NHD" [pages, positions, heads,
            numbers]. With "NHD", query, key and value are slices of one tensor, too.
    """
    nodes = [node for request in requests for node in request]
    num_rows = sum(node[0] for node in nodes)
    longest = max([end for node in nodes for _, end in node[1]], default=0)
    max_pages = longest // heads.page_size + 2
    num_pages = len(requests) * max_pages + 3
    shape = (num_pages, heads.num_kv_heads, heads.page_size, 2 * heads.head_dim)
    query_heads, kv_heads = heads.num_heads, heads.num_kv_heads
    if layout == "NHD":
        kv_cache = torch.randn(shape[0], shape[2], shape[1], shape[3]).to(dtype).transpose(1, 2)
        packed = torch.randn(num_rows, query_heads + 2 * kv_heads + 1, heads.head_dim).to(dtype)
        query, key, value, _ = packed.split([query_heads, kv_heads, kv_heads, 1], dim=1)
    else:
        kv_cache = torch.randn(shape).to(dtype)
        query = torch.randn(num_rows, query_heads, heads.head_dim).to(dtype)
        key, value = torch.randn(2, num_rows, kv_heads, heads.head_dim).to(dtype)
    pages = torch.randperm(num_pages)[: len(requests) * max_pages]
    context = torch.tensor([[*intervals[0], *intervals[1]] for intervals in (_two(node[1]) for node in nodes)])
    return Case(
        query=query,
        key=key,
        value=value,
        kv_cache=kv_cache,
        page_table=pages.view(len(requests), max_pages).int(),
        first_node=_running_sum([len(request) for request in requests]),
        first_row=_running_sum([node[0] for node in nodes]),
        context=context.int().view(len(nodes), 4),
        is_causal=torch.tensor([len(node) == 3 and node[2] for node in nodes], dtype=torch.int32),
        scale=heads.head_dim**-0.5,
    )


def _two(intervals: Sequence[Interval]) -> list[Interval]:
    return [*intervals, *[(0, 0)] * (2 - len(intervals))]


def _running_sum(counts: Sequence[int]) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0).int()


def poisoned_results(case: Case) -> tuple[Tensor, Tensor]:
    """Make `out` and `lse` that are not a result."""
    out = torch.full_like(case.query, float("nan"), memory_format=torch.contiguous_format)
    return out, out.new_full(out.shape[:2], float("nan"), dtype=torch.float32)


def tiles_of(case: Case, num_rows: int | None = None) -> Tensor:
    """Make the tiles of the CUDA kernel."""
    host = HostLayout(*(getattr(case, name).numpy() for name in ("first_node", "first_row", "context", "is_causal")))
    heads_per_kv = case.query.shape[1] // case.key.shape[1]
    return torch.from_numpy(query_tiles(host, heads_per_kv, len(case.query) if num_rows is None else num_rows))


def run(op: Callable[..., None], case: Case, num_splits: int = 1) -> tuple[Tensor, Tensor]:
    """Call an op; (out, lse), of which nothing was a result before."""
    out, lse = poisoned_results(case)
    op(*(getattr(case, name) for name in case.__slots__), out, lse, tiles_of(case), num_splits)
    return out, lse


def expected(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Attend node by node with gathered keys and values, in plain torch of some dtype; (out, lse)."""
    out = torch.zeros(case.query.shape, dtype=dtype)
    lse = torch.full(out.shape[:2], float("-inf"), dtype=dtype)
    for rows, query, key, value, seen in _gathered(case, dtype):
        masked = {} if seen.all() else {"attn_mask": seen}
        attended = scaled_dot_product_attention(query[None], key[None], value[None], scale=case.scale, **masked)[0]
        out[rows] = attended.transpose(0, 1)
        lse[rows] = (case.scale * query @ key.mT).masked_fill(~seen, float("-inf")).logsumexp(-1).T
    return out, lse


def _gathered(case: Case, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor]]:
    """Yield of nodes their rows, [heads, rows or keys, head_dim] of query, key and value, and who sees [rows, keys]."""
    group_size = case.query.shape[1] // case.key.shape[1]
    for request, first, end in case.requests():
        for node in range(first, end):
            rows, positions = case.rows(node), case.visible(node)
            page = case.page_table[request, positions // case.page_size].long()
            stored = case.kv_cache[page, :, positions % case.page_size].chunk(2, dim=-1)
            own = (case.key[rows], case.value[rows])
            key, value = (
                torch.cat(parts).to(dtype).repeat_interleave(group_size, dim=1).transpose(0, 1)
                for parts in zip(stored, own, strict=True)
            )
            query = case.query[rows].to(dtype).transpose(0, 1)
            seen = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool)
            yield rows, query, key, value, seen.tril(len(positions)) if case.is_causal[node] else seen


def lse_bound(case: Case) -> Tensor:
    """Return by how much the log-sum-exp of tensor cores may be off, whatever they do; [num_rows, num_heads].

    With u = 2^-23, twice float32's rounding, as of sums that are cut off. A score is a sum of head_dim products: in any
    order its error is at most head_dim * u * scale * sum |q_i k_i| (Higham, Accuracy and Stability, 4.2), and a tensor
    core aligns MMA_DEPTH products and the sum so far before it adds them: MMA_DEPTH terms more. Four roundings of the
    score follow: scale, change of base, the maximum taken off, and put back on. A log-sum-exp moves by no more than the
    score that moves most. Exponentials, their sum of as many terms as there are keys, and the logarithm come on top.
    """
    unit = torch.finfo(torch.float32).eps
    bound = torch.zeros(case.query.shape[:2], dtype=torch.float64)
    for rows, query, key, _value, seen in _gathered(case, torch.float64):
        size = (case.scale * query.abs() @ key.abs().mT).masked_fill(~seen, 0.0)
        largest = size.amax(-1).T if size.shape[-1] else torch.zeros_like(bound[rows])
        of_sum = EXPONENT_ERROR + unit * (seen.sum(-1)[:, None] + 2)
        bound[rows] = unit * (query.shape[-1] + MMA_DEPTH + 4) * largest + of_sum
    return bound


def assert_close(case: Case, out: Tensor, lse: Tensor, *, by_tensor_cores: bool = False) -> None:
    """Assert an error of at most twice that of torch in the same dtype, and a floor of one rounding.

    The log-sum-exp is float32 whatever the inputs are; so is its comparison, but for products of tensor cores, which
    round in ways of their own: these have `lse_bound`.
    """
    exact_out, exact_lse = expected(case, torch.float64)
    torch_out, _ = expected(case, case.query.dtype)
    _, torch_lse = expected(case, torch.float32)
    sees = exact_lse > float("-inf")
    assert torch.equal(lse == float("-inf"), ~sees)
    assert bool((out[~sees] == 0).all())
    floor = torch.finfo(case.query.dtype).eps * exact_out.abs().amax()
    assert _error(out, exact_out) <= 2 * _error(torch_out, exact_out) + floor
    error = (lse[sees].double() - exact_lse[sees]).abs()
    bound = lse_bound(case)[sees]
    if not by_tensor_cores:
        floor = EXPONENT_ERROR + torch.finfo(torch.float32).eps * exact_lse[sees].abs().amax()
        bound = bound.clamp(max=float(2 * _error(torch_lse[sees], exact_lse[sees]) + floor))
    assert bool((error <= bound).all())


def _error(result: Tensor, exact: Tensor) -> Tensor:
    return (result.double() - exact).abs().amax()
