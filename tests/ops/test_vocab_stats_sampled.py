"""The sampled distribution of `vocab_stats`: softmax(logits / temperature) of what top_k and top_p keep."""

from dataclasses import replace

import pytest
import torch

from tests.ops.vocab import DTYPES, MASK, assert_identical, assert_sampled_sums, head, sampling_of, stats_of


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 1.0), (1, 1.0), (20, 1.0), (0, 0.8003), (9, 0.8003), (0, 1e-9), (0, 1e-300)]
)
@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1e-30, 0.03, 0.7, 1.0, 9.0, 1e30, 1e300])
def test_sampled_sums_are_those_of_the_kept_ids(temperature: float, top_k: int, top_p: float) -> None:
    """No number of ids is exactly 0.8003 of all, where a temperature makes them equal."""
    logits = 3 * torch.randn(33, 3001, generator=torch.Generator().manual_seed(6))
    logits[:, MASK] = -torch.inf
    logits[3], logits[4, 1000:] = 2.0, -torch.inf
    sampling = sampling_of(33, temperature, top_k, top_p)
    sampling.temperature[5] = 0.0
    sampling.top_k[6::2], sampling.top_p[6::2] = 0, 1.0  # others are filtered in company of these
    assert_sampled_sums(stats_of(logits, None, excluded_ids=[], sampling=sampling), logits, sampling)


def test_sampled_sums_that_nobody_wants_are_not_there() -> None:
    logits = 3 * torch.randn(33, 1500, generator=torch.Generator().manual_seed(8))
    sampling = sampling_of(33, 0.7, 20)
    wanted = stats_of(logits, None, sampling=sampling)
    unwanted = stats_of(logits, None, sampling=replace(sampling, wants_sampled=False))
    assert unwanted.sampled_rest is unwanted.sampled_weighted is None
    assert_identical(unwanted, replace(wanted, sampled_rest=None, sampled_weighted=None))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sampled_sums_of_products(dtype: torch.dtype) -> None:
    """Halved logits at half the temperature, in each path of the product: the same distribution."""
    rows, weight = head(33, 70, 1100, dtype)
    for top_k in (0, 9):
        half, one = sampling_of(33, 0.5, top_k), sampling_of(33, 1.0, top_k)
        halved = stats_of(rows / 2, weight, sampling=half)
        whole = stats_of(rows, weight, sampling=one)
        assert torch.equal(halved.token_ids, whole.token_ids)
        for a, b in zip(halved.tensors[-2:], whole.tensors[-2:], strict=True):
            assert torch.equal(a, b)
        if top_k == 0:
            assert torch.equal(whole.tensors[-2], whole.rest)
