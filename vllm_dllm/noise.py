"""Counter-based noise: a uniform number is a function of what it is drawn for, not of when.

A sequential generator makes the tokens of a request depend on its neighbours in the batch, on preemption and on
speculation. Here the number for (seed, absolute position, masked positions left in the block, vocabulary id) is
one hash of these four values, so the next canvas is a function of the canvas.

The hash is the SplitMix64 generator (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014):
its finaliser `mix` folds the first three values into a stream key, and vocabulary id `v` reads element `v + 1` of
that stream. Element 0 is the stream's own number (`id == STREAM`), used for random remasking.

The reference decoders and the engine share this file; it imports torch alone.
"""

import torch
from torch import Tensor

STREAM = -1
"""The id that reads a stream's own number instead of a vocabulary entry's."""

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15, as int64
_MUL_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MUL_2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift int64 right without sign extension (torch has no uint64 shift on every device)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """Apply the SplitMix64 finaliser to each element; int64 products wrap as uint64 ones do."""
    x = (x ^ _shift_right(x, 30)) * _MUL_1
    x = (x ^ _shift_right(x, 27)) * _MUL_2
    return x ^ _shift_right(x, 31)


def stream_keys(seeds: Tensor, positions: Tensor, num_masked: Tensor) -> Tensor:
    """Fold what a row of noise belongs to into one key per row.

    Args:
        seeds: [...] int64, the request's seed.
        positions: [...] int64, absolute position in the sequence.
        num_masked: [...] int64, masked positions left in the block before the step.

    Returns: [...] int64.
    """
    key = _mix(seeds + _GOLDEN)
    key = _mix((key ^ positions) + _GOLDEN)
    return _mix((key ^ num_masked) + _GOLDEN)


def uniform(keys: Tensor, ids: Tensor | int) -> Tensor:
    """Draw the uniform numbers of the given ids in the given streams.

    Args:
        keys: int64, broadcast against `ids`.
        ids: int64, vocabulary ids; or `STREAM`.

    Returns: float64 in the open interval (0, 1): 52 random bits, centred, so that neither bound occurs.
    """
    bits = _shift_right(_mix(keys + (ids + 1) * _GOLDEN), 12)
    return (bits.to(torch.float64) + 0.5) * 2.0**-52


def gumbel(keys: Tensor, ids: Tensor | int) -> Tensor:
    """Draw standard Gumbel numbers, `-ln(-ln u)`, for the given ids in the given streams; float64."""
    return -torch.log(-torch.log(uniform(keys, ids)))
