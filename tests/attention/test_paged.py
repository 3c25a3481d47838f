"""Paged attention against dense attention written from the rule, with poison wherever nothing may be read."""

import pytest
import torch

from vllm_dllm.attention import paged
from vllm_dllm.attention.layout import ContextBuffers, refresh_layout, refresh_rows
from vllm_dllm.attention.paged import block_attention, store_kv

HEAD_DIM = 8


class Requests:
    """Rows of several requests: dense K/V per request, and the same in shuffled pages of a poisoned cache."""

    def __init__(self, row_lens: list[int], kv_heads: int, page_size: int) -> None:
        generator = torch.Generator().manual_seed(sum(row_lens))
        self.row_lens = row_lens
        self.page_size = page_size
        pages_of = [-(-n // page_size) for n in row_lens]
        shuffled = torch.randperm(sum(pages_of) + 3, generator=generator)
        shape = (sum(pages_of) + 3, kv_heads, page_size, 2 * HEAD_DIM)
        self.cache = torch.full(shape, torch.nan)
        self.page_table = torch.full((len(row_lens), max(pages_of) + 2), int(shuffled[-1]), dtype=torch.int32)
        self.key, self.value = [], []
        taken = 0
        for i, (row_len, num_pages) in enumerate(zip(row_lens, pages_of, strict=True)):
            self.page_table[i, :num_pages] = shuffled[taken : taken + num_pages].int()
            taken += num_pages
            self.key.append(torch.randn(row_len, kv_heads, HEAD_DIM, generator=generator))
            self.value.append(torch.randn(row_len, kv_heads, HEAD_DIM, generator=generator))

    def fill(self, i: int, begin: int, end: int) -> None:
        """Store the true K/V of positions [begin, end) of request i."""
        position = torch.arange(begin, end)
        page = self.page_table[i].long()[position // self.page_size]
        kv = torch.cat([self.key[i][begin:end], self.value[i][begin:end]], -1)
        self.cache[page, :, position % self.page_size] = kv


def dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attend from all rows to all of one request's positions, in float64."""
    group = query.shape[1] // key.shape[1]
    key, value = key.double().repeat_interleave(group, 1), value.double().repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", query.double(), key) * HEAD_DIM**-0.5
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value)


@pytest.mark.parametrize(("kv_heads", "group"), [(2, 1), (1, 4)])
@pytest.mark.parametrize("page_size", [1, 7, 16])
@pytest.mark.parametrize("block_length", [4, 5])
def test_denoising_block_sees_its_whole_row(kv_heads: int, group: int, page_size: int, block_length: int) -> None:
    starts = [0, 7, 13, 33 - block_length]
    requests = Requests([block_length, 20, 31, 33], kv_heads, page_size)
    for i, start in enumerate(starts):  # the block's own slots stay poisoned
        requests.fill(i, 0, start)
        requests.fill(i, start + block_length, requests.row_lens[i])
    if starts[0] == 0:  # a hidden column reads position 0, which a refresh has stored
        requests.fill(0, 0, 1)
    query = torch.randn(4 * block_length, kv_heads * group, HEAD_DIM, generator=torch.Generator().manual_seed(9))
    own = [
        (k[s : s + block_length], v[s : s + block_length])
        for k, v, s in zip(requests.key, requests.value, starts, strict=True)
    ]
    context = ContextBuffers(6, 40, torch.device("cpu"))
    context.page.fill_(-1)
    width = 33 - block_length
    context.fill(
        requests.page_table,
        torch.tensor(starts),
        torch.tensor(requests.row_lens),
        block_length=block_length,
        page_size=page_size,
        width=width,
    )
    key, value = (torch.cat(parts) for parts in zip(*own, strict=True))
    out = block_attention(query, key, value, requests.cache, context.layout(4, 1, width), HEAD_DIM**-0.5)
    for i in range(4):
        rows = slice(i * block_length, (i + 1) * block_length)
        assert torch.allclose(out[rows].double(), dense(query[rows], requests.key[i], requests.value[i]), atol=1e-5)


@pytest.mark.parametrize("begins", [[0, 0, 0], [0, 5, 12], [3, 3, 3]])
@pytest.mark.parametrize("page_size", [1, 7, 16])
def test_refresh_sees_and_stores_its_rows(begins: list[int], page_size: int) -> None:
    row_lens, kv_heads, heads = [9, 20, 13], 2, 4
    requests = Requests(row_lens, kv_heads, page_size)
    for i, begin in enumerate(begins):
        requests.fill(i, 0, begin)
    num_rows = sum(row_lens) - sum(begins)
    rows = refresh_rows(torch.tensor(begins), torch.tensor(row_lens), num_rows)
    expected = [(i, p) for i in range(3) for p in range(begins[i], row_lens[i])]
    assert list(zip(rows.group.tolist(), rows.position.tolist(), strict=True)) == expected
    layout = refresh_layout(
        requests.page_table,
        torch.tensor(begins),
        rows,
        page_size=page_size,
        max_own_len=max(n - b for n, b in zip(row_lens, begins, strict=True)),
        max_begin=max(begins),
    )
    key = torch.cat([requests.key[i][b:] for i, b in enumerate(begins)])
    value = torch.cat([requests.value[i][b:] for i, b in enumerate(begins)])
    query = torch.randn(num_rows, heads, HEAD_DIM, generator=torch.Generator().manual_seed(1))
    assert layout.store is not None
    store_kv(key, value, requests.cache, layout.store)
    out = block_attention(query, key, value, requests.cache, layout, HEAD_DIM**-0.5)
    first = 0
    for i, begin in enumerate(begins):
        last = first + row_lens[i] - begin
        expected_out = dense(query[first:last], requests.key[i], requests.value[i])
        assert torch.allclose(out[first:last].double(), expected_out, atol=1e-5)
        first = last
    stored = requests.cache.clone()
    for i in range(3):
        requests.fill(i, 0, row_lens[i])
    assert torch.equal(stored.nan_to_num(7.0), requests.cache.nan_to_num(7.0)), "a place was missed or overwritten"


def test_chunks_of_groups_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = Requests([12, 9, 20, 16, 12], 2, 4)
    for i, row_len in enumerate(requests.row_lens):
        requests.fill(i, 0, row_len)
    context = ContextBuffers(5, 20, torch.device("cpu"))
    starts, lengths = torch.tensor([4, 1, 7, 0, 8]), torch.tensor(requests.row_lens)
    context.fill(requests.page_table, starts, lengths, block_length=4, page_size=4, width=16)
    rows = torch.randn(20, 2, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    whole = block_attention(rows, rows, rows, requests.cache, context.layout(5, 1, 16), 1.0)
    for size in (1, 2 * 2 * 20 * 2 * HEAD_DIM * 4):  # one group at a time, two groups at a time
        monkeypatch.setattr(paged, "CHUNK_BYTES", size)
        assert torch.allclose(block_attention(rows, rows, rows, requests.cache, context.layout(5, 1, 16), 1.0), whole)


@pytest.mark.parametrize("num_nodes", [1, 3])
@pytest.mark.parametrize("chunk_bytes", [1, 256 << 20])
def test_nodes_see_their_requests_context_and_not_each_other(
    num_nodes: int, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paged, "CHUNK_BYTES", chunk_bytes)
    requests = Requests([12, 9, 20], 2, 4)
    starts, length = [4, 1, 16], 4
    for i, start in enumerate(starts):
        requests.fill(i, 0, start)
        requests.fill(i, start + length, requests.row_lens[i])
    context = ContextBuffers(3, 20, torch.device("cpu"))
    context.fill(
        requests.page_table,
        torch.tensor(starts),
        torch.tensor(requests.row_lens),
        block_length=length,
        page_size=4,
        width=16,
    )
    generator = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(3 * num_nodes * length, 2, HEAD_DIM, generator=generator) for _ in range(3))
    layout = context.layout(3, num_nodes, 16)
    out = block_attention(query, key, value, requests.cache, layout, HEAD_DIM**-0.5)
    for node in range(3 * num_nodes):
        i, rows = node // num_nodes, slice(node * length, (node + 1) * length)
        row_key, row_value = requests.key[i].clone(), requests.value[i].clone()
        row_key[starts[i] : starts[i] + length] = key[rows]
        row_value[starts[i] : starts[i] + length] = value[rows]
        assert torch.allclose(out[rows].double(), dense(query[rows], row_key, row_value), atol=1e-5)


def test_padding_of_a_captured_batch_is_finite() -> None:
    requests = Requests([12, 12], 2, 4)
    requests.cache.zero_()
    context = ContextBuffers(4, 16, torch.device("cpu"))
    context.fill(requests.page_table[:1], torch.tensor([4]), torch.tensor([12]), block_length=4, page_size=4, width=16)
    context.clear(1, 3)
    rows = torch.randn(12, 2, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    out = block_attention(rows, rows, rows, requests.cache, context.layout(3, 1, 16), 1.0)
    assert torch.isfinite(out).all()
    assert torch.allclose(out[4:8].double(), dense(rows[4:8] * HEAD_DIM**0.5, rows[4:8], rows[4:8]), atol=1e-5)
