"""The counter-based noise: the published generator, its interval, its distribution, its independence."""

import math

import pytest
import torch

from vllm_dllm.noise import STREAM, gumbel, stream_keys, uniform

WORD = 1 << 64


def to_signed(word: int) -> int:
    """Read 64 bits as int64."""
    return word - WORD if word >> 63 else word


def unshift(word: int, bits: int) -> int:
    """Invert x -> x ^ (x >> bits)."""
    x = word
    for _ in range(64 // bits):
        x = word ^ (x >> bits)
    return x


def key_whose_first_output_is(word: int) -> int:
    """Invert the SplitMix64 finaliser and its increment."""
    word = unshift(word, 31) * pow(0x94D049BB133111EB, -1, WORD) % WORD
    word = unshift(word, 27) * pow(0xBF58476D1CE4E5B9, -1, WORD) % WORD
    return to_signed((unshift(word, 30) - 0x9E3779B97F4A7C15) % WORD)


def test_outputs_are_those_of_splitmix64():
    """The first outputs for the seed 1234567, as the generator's authors publish them."""
    words = (6457827717110365317, 3203168211198807973)
    drawn = uniform(torch.tensor(1234567), torch.tensor([0, 1]))
    assert drawn.tolist() == [((word >> 12) + 0.5) * 2.0**-52 for word in words]


@pytest.mark.parametrize(("word", "expected"), [(0, 2.0**-53), (WORD - 1, 1 - 2.0**-53)], ids=["lowest", "highest"])
def test_interval_is_open(word, expected):
    key = torch.tensor(key_whose_first_output_is(word))
    assert uniform(key, torch.tensor(0)).item() == expected
    assert math.isfinite(gumbel(key, torch.tensor(0)).item())


def test_moments_of_uniform_and_gumbel():
    keys = stream_keys(torch.tensor(7), torch.arange(200), torch.tensor(5))
    u = uniform(keys[:, None], torch.arange(500))
    standard_error = (1 / 12 / u.numel()) ** 0.5
    assert abs(u.mean().item() - 0.5) < 4 * standard_error
    assert abs(u.var().item() - 1 / 12) < 4 * (1 / 180 / u.numel()) ** 0.5
    noise = gumbel(keys[:, None], torch.arange(500))
    assert abs(noise.mean().item() - 0.5772156649) < 4 * (math.pi**2 / 6 / noise.numel()) ** 0.5


@pytest.mark.parametrize("varied", ["seeds", "positions", "num_masked", "ids"])
def test_neighbours_are_uncorrelated(varied):
    """Numbers whose arguments differ by one in one place have no common part."""
    count = 20000
    values = {name: torch.full((count,), 12) for name in ("seeds", "positions", "num_masked", "ids")}
    values[varied] = torch.arange(count)
    ids = values.pop("ids")
    u = uniform(stream_keys(**values), ids)
    correlation = torch.corrcoef(torch.stack((u[:-1], u[1:])))[0, 1]
    assert abs(correlation.item()) < 4 / count**0.5
    assert u.unique().numel() == count


def test_keys_do_not_confuse_their_parts():
    """Swapped or shifted arguments give other streams, although the parts are small integers."""
    parts = torch.cartesian_prod(torch.arange(20), torch.arange(20), torch.arange(20))
    assert stream_keys(*parts.unbind(-1)).unique().numel() == len(parts)


def test_number_is_a_function_of_its_arguments_alone():
    keys = stream_keys(torch.tensor([3, 4, 5]), torch.tensor([9, 9, 9]), torch.tensor([1, 2, 3]))
    ids = torch.arange(50)
    together = uniform(keys[:, None], ids)
    alone = uniform(stream_keys(torch.tensor(4), torch.tensor(9), torch.tensor(2)), torch.tensor(17))
    assert together[1, 17] == alone
    assert not (together == uniform(keys, torch.tensor(STREAM))[:, None]).any()
