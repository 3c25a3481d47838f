"""Data, calls and comparisons that the tests of `vocab_stats` share."""

from typing import Any

import torch
from torch import Tensor

from vllm_dllm import noise
from vllm_dllm.ops import vocab_stats
from vllm_dllm.ops.vocab_stats import PartialStats, RowSampling
from vllm_dllm.unmask.stats import kept_ids

MASK = 3
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 2.0**-24


def head(num_rows: int, hidden_size: int, num_ids: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_rows + hidden_size + num_ids)
    rows = torch.randn(num_rows, hidden_size, generator=generator)
    weight = torch.randn(num_ids, hidden_size, generator=generator) * 3 / hidden_size**0.5
    return rows.to(dtype), weight.to(dtype)


def sampling_of(num_rows: int, temperature: float, top_k: int = 0, top_p: float = 1.0, seed: int = 7) -> RowSampling:
    keys = noise.stream_keys(torch.tensor(seed), torch.arange(num_rows), torch.tensor(3))
    return RowSampling(
        temperature=torch.full((num_rows,), temperature, dtype=torch.float64),
        top_k=torch.full((num_rows,), top_k),
        top_p=torch.full((num_rows,), top_p, dtype=torch.float64),
        keys=keys,
        has_filter=top_k > 0 or top_p < 1,
        wants_sampled=True,
    )


def stats_of(rows: Tensor, weight: Tensor | None, **options: Any) -> PartialStats:
    defaults: dict[str, Any] = {"excluded_ids": [MASK], "num_candidates": 8, "sampling": None}
    return vocab_stats(rows, weight, **(defaults | options))


def assert_identical(got: PartialStats, expected: PartialStats) -> None:
    for number, (a, b) in enumerate(zip(got.tensors, expected.tensors, strict=True)):
        assert torch.equal(a.nan_to_num(nan=-7), b.nan_to_num(nan=-7)), number


def assert_sampled_sums(stats: PartialStats, logits: Tensor, sampling: RowSampling) -> None:
    """Compare with float64.

    Of each term: three roundings of x, some of the exponential and the product, and one for each of at most 64 float32
    sums that it goes through. float32 has no exponentials below 2^-126.

    Args:
        stats: of the logits.
        logits: [num_rows, num_ids], excluded ids are -inf.
        sampling: of the rows.
    """
    assert stats.sampled_rest is not None
    assert stats.sampled_weighted is not None
    largest, argmax = logits.double().max(1, keepdim=True)
    x = (logits.double() - largest) / sampling.divisor[:, None]
    is_drawn = (sampling.temperature > 0)[:, None]
    mass = x.exp().scatter(1, argmax, 0.0)
    if sampling.has_filter:
        mass = mass.masked_fill(is_drawn & ~kept_ids(logits.float(), sampling), 0.0)
    terms = torch.where(mass == 0, 0.0, x * mass)
    roundings = EPS * (72 - 3 * torch.where(mass == 0, 0.0, x))
    underflow = logits.shape[1] * 2.0**-126 * 87
    for got, want in ((stats.sampled_rest, mass), (stats.sampled_weighted, terms)):
        assert ((got - want.sum(1)).abs() <= (roundings * want.abs()).sum(1) + underflow).all()
    is_greedy = ~is_drawn[:, 0]
    assert torch.equal(stats.sampled_rest[is_greedy], stats.rest[is_greedy])
    assert torch.equal(stats.sampled_weighted[is_greedy], stats.weighted[is_greedy])
