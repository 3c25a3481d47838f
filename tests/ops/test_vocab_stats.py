"""`vocab_stats` against float64 and same-dtype torch, its torch twin, itself by shards, and in other companies."""

import re
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.vocab import DTYPES, MASK, assert_identical, assert_sampled_sums, head, sampling_of, stats_of
from vllm_dllm.ops.vocab_stats import PartialStats, merge
from vllm_dllm.unmask.stats import torch_stats

SIZES = [(1, 1, 1), (7, 33, 113), (33, 113, 1025), (195, 70, 259), (2, 1030, 64)]
"""(num_rows, hidden_size, num_ids): beyond one work of rows, one slice of the depth, one chunk of ids, and below."""
EXP_FLOOR = 4e-6
"""Relative error of a float32 exp(-d) for d <= 30: rounding d * log2(e) costs d * 2^-24, the polynomial 2e-7."""


def rows_of(stats: PartialStats, index: Tensor) -> PartialStats:
    return PartialStats(*(tensor[index] for tensor in stats.tensors))


def sums(logits: Tensor) -> tuple[Tensor, Tensor]:
    """`rest` and `weighted` of float64 or float32 logits, in their dtype."""
    largest, argmax = logits.max(1, keepdim=True)
    below = logits - largest
    mass = below.exp().scatter(1, argmax, 0.0)
    return mass.sum(1), torch.where(mass > 0, below * mass, 0.0).sum(1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_rows", "hidden_size", "num_ids"), SIZES)
def test_errors_are_those_of_torch(num_rows: int, hidden_size: int, num_ids: int, dtype: torch.dtype) -> None:
    rows, weight = head(num_rows, hidden_size, num_ids, dtype)
    stats = stats_of(rows, weight, excluded_ids=[])
    exact = rows.double() @ weight.double().t()
    same_dtype = (rows @ weight.t()).float()
    logit_floor = hidden_size**0.5 * 2**-24 * float(exact.abs().amax())  # a float32 sum of so many terms
    bound = 2 * (same_dtype - exact).abs().amax() + logit_floor
    error = float(
        (stats.top_logits[:, :num_ids] - exact.gather(1, stats.top_ids.clamp(min=0))[:, :num_ids]).abs().amax()
    )
    assert error <= bound
    assert float((stats.top_logits[:, 0] - exact.amax(1)).abs().amax()) <= bound
    for got, want, theirs in zip((stats.rest, stats.weighted), sums(exact), sums(same_dtype), strict=True):
        floor = (2 * logit_floor * num_ids**0.5 + EXP_FLOOR) * want.abs()
        assert ((got - want).abs() <= 2 * (theirs - want).abs().amax() + floor).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_candidates", [1, 3, 8])
def test_logits_equal_torch(dtype: torch.dtype, num_candidates: int) -> None:
    logits = (4 * torch.randn(33, 2100, generator=torch.Generator().manual_seed(1))).to(dtype)
    stats = stats_of(logits, None, num_candidates=num_candidates)
    allowed = logits.double().index_fill(1, torch.tensor([MASK]), -torch.inf)
    ordered, ids = allowed.sort(dim=1, descending=True, stable=True)
    assert torch.equal(stats.top_ids, ids[:, :num_candidates])
    assert torch.equal(stats.top_logits.double(), ordered[:, :num_candidates])
    assert torch.equal(stats.token_ids, ids[:, 0])
    assert torch.equal(stats.scores, ordered[:, 0])
    for got, want in zip((stats.rest, stats.weighted), sums(allowed), strict=True):
        assert torch.allclose(got, want, rtol=EXP_FLOOR, atol=0)


def test_finished_statistics_are_those_of_the_softmax() -> None:
    logits = 4 * torch.randn(7, 113, generator=torch.Generator().manual_seed(2))
    sampling = sampling_of(7, 1.0)
    stats = stats_of(logits, None, sampling=sampling)
    distribution = stats.distribution(sampling.divisor)
    log_probs = logits.double().index_fill(1, torch.tensor([MASK]), -torch.inf).log_softmax(1)
    probs = log_probs.exp()
    drawn = probs.gather(1, stats.token_ids[:, None])[:, 0]
    entropy = -torch.where(probs > 0, probs * log_probs, 0).sum(1)
    assert torch.allclose(distribution.confidence, drawn, rtol=EXP_FLOOR, atol=0)
    assert torch.allclose(stats.log_probs, log_probs.gather(1, stats.top_ids), rtol=0, atol=EXP_FLOOR)
    assert torch.allclose(distribution.entropy, entropy, rtol=10 * EXP_FLOOR, atol=0)


def test_equal_logits_go_to_the_lowest_id() -> None:
    logits = torch.zeros(2, 3000)
    logits[1, [7, 1500, 1501, 2999]] = 1.0
    stats = stats_of(logits, None, num_candidates=4, excluded_ids=[0, 7])
    assert stats.top_ids.tolist() == [[1, 2, 3, 4], [1500, 1501, 2999, 1]]
    assert stats.token_ids.tolist() == [1, 1500]


def test_strides() -> None:
    rows, weight = head(7, 33, 113, torch.bfloat16)
    wide_rows, wide_weight = torch.full((7, 70), torch.nan), torch.full((113, 41), torch.nan)
    wide_rows[:, 5:38], wide_weight[:, 3:36] = rows, weight
    strided = stats_of(wide_rows.bfloat16()[:, 5:38], wide_weight.bfloat16()[:, 3:36])
    assert_identical(strided, stats_of(rows, weight))


@pytest.mark.parametrize("top_p", [1.0, 0.8, 1e-9])
@pytest.mark.parametrize("top_k", [0, 1, 20, 5000])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_tokens_equal_the_torch_twin(temperature: float, top_k: int, top_p: float) -> None:
    logits = 3 * torch.randn(33, 3001, generator=torch.Generator().manual_seed(3))
    sampling = sampling_of(33, temperature, top_k, top_p)
    sampling.temperature[5] = 0.0  # among others that draw
    got = stats_of(logits, None, sampling=sampling)
    expected = torch_stats(logits.clone(), excluded_ids=[MASK], num_candidates=8, sampling=sampling)
    assert torch.equal(got.token_ids, expected.token_ids)
    assert torch.equal(got.token_logits, expected.token_logits)
    assert torch.allclose(got.scores, expected.scores, rtol=1e-14, atol=1e-14)  # two float64 logarithms
    assert torch.equal(got.top_ids, expected.top_ids)


@pytest.mark.parametrize(("top_k", "top_p"), [(3, 1.0), (0, 0.47), (4, 0.47)])
def test_filters_of_equal_logits_equal_the_torch_twin(top_k: int, top_p: float) -> None:
    """top_k keeps all equals of the k-th, top_p the lowest ids of them; no sum of n-ths is exactly top_p."""
    values = torch.tensor([0.0, 1.0, 2.0]).log1p()
    logits = values[torch.randint(3, (200, 33), generator=torch.Generator().manual_seed(4))]
    sampling = sampling_of(200, 1.0, top_k, top_p)
    expected = torch_stats(logits.clone(), excluded_ids=[MASK], num_candidates=1, sampling=sampling)
    stats = stats_of(logits, None, sampling=sampling)
    assert torch.equal(stats.token_ids, expected.token_ids)
    assert_sampled_sums(stats, logits.index_fill(1, torch.tensor([MASK]), -torch.inf), sampling)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
@pytest.mark.parametrize("temperature", [1e-4, 0.05, 1.0, 30.0])
def test_the_bound_of_the_noise_drops_no_winner(temperature: float, scale: float) -> None:
    logits = scale * torch.randn(64, 1500, generator=torch.Generator().manual_seed(5)) - 2 * scale
    sampling = sampling_of(64, temperature)
    expected = torch_stats(logits.clone(), excluded_ids=[MASK], num_candidates=1, sampling=sampling)
    assert torch.equal(stats_of(logits, None, sampling=sampling).token_ids, expected.token_ids)


def test_excluded_ids_are_never_drawn() -> None:
    logits = torch.full((200, 113), -20.0)
    logits[:, [MASK, 9]] = 20.0
    stats = stats_of(logits, None, excluded_ids=[MASK, 9, 4000], sampling=sampling_of(200, 1.0))
    assert not {MASK, 9} & set(stats.token_ids.tolist() + stats.top_ids.flatten().tolist())
    assert torch.allclose(stats.rest, torch.tensor(110.0, dtype=torch.float64))


@pytest.mark.parametrize("top_k", [0, 2])
def test_what_is_missing_and_what_is_no_number(top_k: int) -> None:
    logits = torch.full((3, 1100), -torch.inf)
    logits[0, 1050], logits[2, 5], logits[2, 1060] = 1.0, torch.nan, 2.0
    sampling = sampling_of(3, 0.7, top_k)
    stats = stats_of(logits, None, num_candidates=2, sampling=sampling)
    assert stats.top_ids.tolist() == [[1050, -1], [-1, -1], [1060, -1]]
    assert stats.token_ids.tolist() == [1050, 0, 1060]
    assert stats.rest[:2].tolist() == stats.weighted[:2].tolist() == [0.0, 0.0]
    distribution = stats.distribution(sampling.divisor)
    assert distribution.confidence[0] == distribution.margin[0] == 1.0
    assert distribution.confidence[1:].isnan().all()
    assert stats.weighted[2].isnan()
    for sums in stats.tensors[-2:]:
        assert sums[:2].tolist() == [0.0, 0.0]
        assert sums[2].isnan()


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.9), (3, 1.0), (3, 0.5)])
def test_an_infinite_logit_is_drawn(top_k: int, top_p: float) -> None:
    logits = torch.randn(2, 1100)
    logits[:, [77, 1050]] = torch.inf
    sampling = sampling_of(2, 1.0, top_k, top_p)
    stats = stats_of(logits, None, sampling=sampling)
    assert stats.token_ids.tolist() == [77, 77]
    assert stats.distribution(sampling.divisor).confidence.isnan().all()


@pytest.mark.parametrize("cuts", [[], [1], [33, 1024, 1030]])
@pytest.mark.parametrize("temperature", [0.0, 1e-300, 0.4, 1.0])
def test_merged_shards_equal_the_whole(cuts: list[int], temperature: float) -> None:
    rows, weight = head(33, 33, 2100)
    sampling = sampling_of(33, temperature)
    whole = stats_of(rows, weight, sampling=sampling)
    parts = [
        stats_of(rows, weight[begin:end], first_id=begin, sampling=sampling)
        for begin, end in zip([0, *cuts], [*cuts, 2100], strict=True)
    ]
    merged = merge(parts, sampling)
    for name in ("top_ids", "top_logits", "token_ids", "token_logits", "scores"):
        assert torch.equal(getattr(merged, name), getattr(whole, name)), name
    for name in ("rest", "weighted", "sampled_rest", "sampled_weighted"):
        assert torch.allclose(getattr(merged, name), getattr(whole, name), rtol=2 * EXP_FLOOR, atol=0), name


def test_merged_shards_without_a_candidate() -> None:
    logits = torch.full((2, 40), -torch.inf)
    logits[0, 30] = 1.0
    sampling = sampling_of(2, 0.4)
    merged = merge([stats_of(logits[:, i : i + 20], None, first_id=i, sampling=sampling) for i in (0, 20)], sampling)
    assert merged.top_ids[:, 0].tolist() == [30, -1]
    assert merged.token_ids.tolist() == [30, 0]
    assert merged.rest.tolist() == merged.weighted.tolist() == [0.0, 0.0]
    assert [sums.tolist() for sums in merged.tensors[-2:]] == 2 * [[0.0, 0.0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_weight", [True, False])
def test_companions_change_nothing(dtype: torch.dtype, has_weight: bool) -> None:
    rows, weight = head(211, 66, 1300, dtype)
    if not has_weight:
        rows, weight = (rows @ weight.t()), None  # type: ignore[assignment]
    sampling = sampling_of(211, 0.7, top_p=0.9)
    sampling.top_p[::2] = 1.0
    together = stats_of(rows, weight, sampling=sampling)
    for index in ([0], [7], [210], [3, 50, 100], list(range(40, 90))):
        names = ("temperature", "top_k", "top_p", "keys")
        own = replace(sampling, **{name: getattr(sampling, name)[index] for name in names})
        assert_identical(stats_of(rows[index], weight, sampling=own), rows_of(together, torch.tensor(index)))


def test_threads_change_nothing() -> None:
    rows, weight = head(50, 66, 4000)
    before = torch.get_num_threads()
    try:
        results = []
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            results.append(stats_of(rows, weight, sampling=sampling_of(50, 0.7, top_p=0.9)))
    finally:
        torch.set_num_threads(before)
    assert_identical(results[1], results[0])
    assert_identical(results[2], results[0])


def test_no_rows() -> None:
    rows, weight = head(7, 33, 113)
    stats = stats_of(rows[:0], weight)
    assert stats.top_ids.shape == (0, 8)
    assert stats.rest.shape == (0,)


@pytest.mark.usefixtures("collected")
@pytest.mark.parametrize("has_weight", [True, False])
def test_opcheck(has_weight: bool) -> None:
    rows, weight = head(7, 33, 113)
    stats_of(rows, weight)
    sampling = sampling_of(7, 1.0, 5)
    drawing = (sampling.keys, sampling.temperature, sampling.top_k, sampling.top_p)
    ids = (torch.zeros(7, 3, dtype=torch.int64), torch.full((7, 4), -1, dtype=torch.int32))
    for wants_sampled, own in product((False, True), ((*drawing, *ids), (None,) * 6)):
        args = (rows, weight if has_weight else None, 0, [MASK], 8, wants_sampled, *own)
        torch.library.opcheck(torch.ops.vllm_dllm.vocab_stats.default, args)


@pytest.mark.usefixtures("collected")
def test_can_be_traced() -> None:
    rows, weight = head(7, 33, 113)
    sampling = sampling_of(7, 1.0)

    def confidence(rows: Tensor) -> Tensor:
        return stats_of(rows, weight, sampling=sampling).distribution(sampling.divisor).confidence

    assert torch.equal(torch.compile(confidence, fullgraph=True, backend="eager")(rows), confidence(rows))


ROWS, WEIGHT = torch.zeros(7, 33), torch.zeros(113, 33)


@pytest.mark.parametrize(
    ("rows", "weight", "options", "message"),
    [
        (ROWS[0], WEIGHT, {}, "rows must be [num_rows, hidden_size], or [num_rows, num_ids] without a weight, got"),
        (ROWS.double(), WEIGHT, {}, "rows must be float32, float16 or bfloat16, got Double; convert it with .to()"),
        (ROWS[:, ::2], None, {}, "rows must be contiguous in its last dimension, got strides [33, 2]; call .cont"),
        (ROWS, WEIGHT.half(), {}, "weight must be Float, got Half; convert it with .to()"),
        (ROWS, WEIGHT[:, :9], {}, "rows must be [num_rows, hidden_size] with the hidden_size of the weight, 1 or"),
        (ROWS, WEIGHT[:0], {}, "0 ids from 0 on are given; give 1 or more, all in [0, 2^31 - 1)"),
        (ROWS, WEIGHT, {"first_id": 2**31 - 100}, "113 ids from 2147483548 on are given; give 1 or more, all in"),
        (ROWS, WEIGHT, {"num_candidates": 9}, "num_candidates is 9; give 1 to 8"),
        (ROWS, WEIGHT, {"excluded_ids": list(range(9))}, "9 excluded_ids are given; give at most 8"),
        (ROWS, WEIGHT, {"sampling": sampling_of(5, 1.0)}, "keys must be [7], got [5]; give one value per row"),
        (ROWS, WEIGHT, {"first_id": 2**63 - 1}, "113 ids from 9223372036854775807 on are given; give 1 or more, all"),
        (ROWS, WEIGHT, {"sampling": sampling_of(7, 1.0, 2), "first_id": 4}, "top_k and top_p need the logits of"),
    ],
    ids=lambda value: None if isinstance(value, (Tensor, dict)) else str(value)[:20],
)  # fmt: skip
def test_bad_calls_say_what_is_wrong(rows: Tensor, weight: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=re.escape(f"vocab_stats: {message}")):
        stats_of(rows, weight, **options)
