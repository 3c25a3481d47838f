"""The sums of the sampled distribution in float64, which every `vocab_stats` is compared with."""

import torch
from torch import Tensor

from vllm_dllm.ops.vocab_stats import PartialStats, RowSampling
from vllm_dllm.unmask.stats import kept_ids

EPS = 2.0**-24


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
