"""Ids that rows of `vocab_stats` ask for, and ids that they may take: native, emulated and by torch."""

import re
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tests.ops import simt
from tests.ops.vocab import DTYPES, MASK, assert_identical, head, sampling_of, stats_of
from vllm_dllm.ops.vocab_stats import PartialStats, RowIds, RowSampling, merge
from vllm_dllm.unmask.stats import torch_stats

SIZES = [(7, 33, 113), (33, 70, 1100), (195, 16, 259)]
"""(num_rows, hidden_size, num_ids): within and beyond one chunk of ids, beyond one work of rows."""


def bits(is_allowed: Tensor) -> Tensor:
    """Pack [num_rows, num_ids] bool."""
    num_rows, num_ids = is_allowed.shape
    padded = torch.zeros(num_rows, -(-num_ids // 32) * 32, dtype=torch.int64)
    padded[:, :num_ids] = is_allowed
    words: Tensor = (padded.view(num_rows, -1, 32) << torch.arange(32)).sum(2)
    return words.where(words < 2**31, words - 2**32).int()


def draw_given(num_rows: int, num_ids: int) -> Tensor:
    """Draw ids with repetitions; some are none, excluded, or of no vocabulary."""
    given = torch.randint(0, num_ids, (num_rows, 8), generator=torch.Generator().manual_seed(num_ids))
    given[:, 1], given[::2, 2], given[:, 3], given[::3, 4] = given[:, 0], -1, MASK, num_ids
    return given


def draw_allowed(num_rows: int, num_ids: int) -> Tensor:
    """Draw sets of ids; one row may take all, one has a word of none."""
    is_allowed = torch.rand(num_rows, num_ids, generator=torch.Generator().manual_seed(num_rows)) < 0.4
    is_allowed[0], is_allowed[1, :64] = True, False
    return is_allowed


def without(logits: Tensor, is_allowed: Tensor) -> Tensor:
    return logits.masked_fill(~is_allowed, -torch.inf)


def by_cuda(logits: Tensor, sampling: RowSampling | None, ids: RowIds) -> PartialStats:
    if sampling is not None:
        names = ("temperature", "top_k", "top_p", "keys")
        sampling = replace(sampling, **{name: getattr(sampling, name).cuda() for name in names})
    on_gpu = RowIds(*(None if each is None else each.cuda() for each in (ids.given, ids.allowed)))
    return PartialStats.of(Tensor.cpu, stats_of(logits.cuda(), None, sampling=sampling, ids=on_gpu))


def by_simt(logits: Tensor, sampling: RowSampling | None, ids: RowIds, first_id: int = 0) -> PartialStats:
    filters = sampling if sampling is not None and sampling.has_filter else None
    wants = sampling is not None
    noise = (sampling and sampling.keys, sampling and sampling.temperature)
    cuts = (filters and filters.top_k, filters and filters.top_p)
    found = simt.ops().vocab_stats(logits, None, first_id, [MASK], 8, wants, *noise, *cuts, ids.given, ids.allowed)
    stats = PartialStats(*found)
    return stats if wants else replace(stats, sampled_rest=None, sampled_weighted=None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_given_logits_are_those_that_the_candidates_have(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Bit for bit, in each path of the product, alone and in company, by shards and whole."""
    num_rows, _, num_ids = size
    rows, weight = head(*size, dtype)
    plain = stats_of(rows, weight)
    given = torch.where(draw_given(num_rows, num_ids) < 0, -1, plain.top_ids)
    given[:, 5] = MASK
    stats = stats_of(rows, weight, ids=RowIds(given))
    assert stats.given_logits is not None
    expected = plain.top_logits.masked_fill((given < 0) | (given == MASK), -torch.inf)
    assert torch.equal(stats.given_logits, expected)
    assert_identical(replace(stats, given_logits=None), plain)
    alone = stats_of(rows[5:6], weight, ids=RowIds(given[5:6]))
    assert torch.equal(alone.given_logits, expected[5:6])  # type: ignore[arg-type]
    cuts = (0, 37, 64, num_ids)
    shards = [stats_of(rows, weight[a:b], first_id=a, ids=RowIds(given)) for a, b in pairwise(cuts)]
    assert torch.equal(merge(shards, None).given_logits, expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("is_sampled", [False, True])
@pytest.mark.parametrize("where", ["cpu", simt.WHERE, pytest.param("cuda", marks=pytest.mark.gpu)])
def test_given_logits_equal_the_twin(where: str, is_sampled: bool) -> None:
    logits = 3 * torch.randn(7, 9000, generator=torch.Generator().manual_seed(1))
    sampling = sampling_of(7, 0.7, top_k=20) if is_sampled else None
    ids = RowIds(draw_given(7, 9000))
    by_torch = torch_stats(logits.clone(), excluded_ids=[MASK], num_candidates=8, sampling=sampling, ids=ids)
    ways = {
        "simt": by_simt,
        "cuda": by_cuda,
        "cpu": lambda *call: stats_of(call[0], None, sampling=call[1], ids=call[2]),
    }
    found = ways[where](logits, sampling, ids)
    assert torch.equal(found.given_logits, by_torch.given_logits)  # type: ignore[arg-type]
    assert torch.equal(found.token_ids, by_torch.token_ids)
    shifted = replace(ids, given=ids.given + 50 * (ids.given >= 0))  # type: ignore[operator]
    if where == "simt" and not is_sampled:  # the ids 50 on; none is excluded there
        expected = torch.where(ids.given == 9000, -torch.inf, logits.gather(1, ids.given.clamp(0, 8999)))  # type: ignore[union-attr]
        expected[ids.given == -1] = -torch.inf
        assert torch.equal(by_simt(logits, None, shifted, first_id=50).given_logits, expected)  # type: ignore[arg-type]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(0.0, 0, 1.0), (0.7, 0, 1.0), (0.7, 20, 0.8)])
@pytest.mark.parametrize("where", ["cpu", simt.WHERE, "torch", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_ids_that_are_not_allowed_are_as_if_their_logits_were_not_there(
    where: str, temperature: float, top_k: int, top_p: float
) -> None:
    logits = 3 * torch.randn(7, 8300, generator=torch.Generator().manual_seed(2))
    is_allowed, sampling = draw_allowed(7, 8300), sampling_of(7, temperature, top_k, top_p)
    ids = RowIds(draw_given(7, 8300), bits(is_allowed))
    removed = RowIds(ids.given)

    def stats(logits: Tensor, ids: RowIds) -> PartialStats:
        if where in {"simt", "cuda"}:
            return (by_simt if where == "simt" else by_cuda)(logits, sampling, ids)
        if where == "cpu":
            return stats_of(logits, None, sampling=sampling, ids=ids)
        return torch_stats(logits.clone(), excluded_ids=[MASK], num_candidates=8, sampling=sampling, ids=ids)

    found, expected = stats(logits, ids), stats(without(logits, is_allowed), removed)
    assert_identical(found, expected)
    assert is_allowed.gather(1, found.top_ids).all()
    assert is_allowed.gather(1, found.token_ids[:, None]).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_allowed_ids_of_products_and_shards(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    num_rows, _, num_ids = size
    rows, weight = head(*size, dtype)
    is_allowed = draw_allowed(num_rows, num_ids)
    ids, sampling = RowIds(allowed=bits(is_allowed)), sampling_of(num_rows, 0.7)
    whole = stats_of(rows, weight, sampling=sampling, ids=ids)
    everything = stats_of(rows, weight, sampling=sampling)
    assert_identical(PartialStats.of(lambda c: c[:1], whole), PartialStats.of(lambda c: c[:1], everything))
    assert is_allowed.gather(1, whole.top_ids.clamp(min=0))[whole.top_ids >= 0].all()
    is_kept = is_allowed.gather(1, everything.top_ids)
    first_kept = everything.top_ids.gather(1, is_kept.byte().argmax(1, keepdim=True))[:, 0]
    has_kept = is_kept.any(1)
    assert has_kept.sum() > 5
    assert torch.equal(whole.top_ids[has_kept, 0], first_kept[has_kept])
    cuts = (0, 37, 64, num_ids)
    shards = [stats_of(rows, weight[a:b], first_id=a, sampling=sampling, ids=ids) for a, b in pairwise(cuts)]
    merged = merge(shards, sampling)
    for name in ("top_ids", "top_logits", "token_ids", "token_logits", "scores"):
        assert torch.equal(getattr(merged, name), getattr(whole, name)), name
    for name in ("rest", "weighted", "sampled_rest", "sampled_weighted"):
        assert torch.allclose(getattr(merged, name), getattr(whole, name), rtol=1e-5, atol=1e-9), name


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (RowIds(torch.zeros(2, 9, dtype=torch.int64)), "9 given_ids are given per row; give at most 8"),
        (RowIds(torch.zeros(3, 2, dtype=torch.int64)), "given_ids must be [2, 2], got [3, 2]; give as many ids"),
        (RowIds(torch.zeros(2, 2)), "given_ids must be Long, got Float; convert it with .to()"),
        (
            RowIds(allowed=torch.zeros(2, 1, dtype=torch.int32)),
            "allowed has 1 words of 32 ids per row for ids up to 40",
        ),
        (RowIds(allowed=torch.zeros(1, 2, dtype=torch.int32)), "allowed must be [2, 2], got [1, 2]; give one row of"),
        (RowIds(allowed=torch.zeros(2, 2, dtype=torch.int64)), "allowed must be Int, got Long; convert it with .to()"),
    ],
)
def test_bad_ids_say_what_is_wrong(ids: RowIds, message: str) -> None:
    with pytest.raises(RuntimeError, match=re.escape(f"vocab_stats: {message}")):
        stats_of(torch.zeros(2, 41), None, ids=ids)
