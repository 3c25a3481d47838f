"""The estimate of a continuation's likelihood (`reference.loglikelihood`): which positions its samples mask, what an
engine is asked for each of them, and what the log-probabilities come to.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_dllm.noise import STREAM, stream_keys, uniform
from vllm_dllm.state.pins import OPEN


@dataclass(frozen=True, slots=True)
class Estimate:
    """A log-likelihood in nats."""

    value: float
    standard_error: float  # of the samples as if each had drawn its own number of masks; nan of a single one
    tokens: list[float]  # parts of the value, by position; no token's own log-probability


def draw_masks(num_samples: int, length: int, seed: int) -> NDArray[np.bool_]:
    """Return which positions of a continuation each sample masks; [num_samples, length].

    Sample i masks `k = (round(first + i length / num_samples) - 1) mod length + 1` of them, with one
    `first` of 1..length.

    Args:
        num_samples, length: 1 or more.
        seed: any 64-bit signed value.
    """
    sample, position = torch.arange(num_samples)[:, None], torch.arange(length + 1)
    seeds = torch.full((num_samples, length + 1), seed, dtype=torch.int64)
    drawn = uniform(stream_keys(seeds, position, sample), STREAM).numpy()
    first = 1 + int(drawn[0, length] * length)
    count = (np.round(first + np.arange(num_samples) * (length / num_samples)) - 1) % length + 1
    rank = drawn[:, :length].argsort(1, kind="stable").argsort(1, kind="stable")
    is_masked: NDArray[np.bool_] = rank < count[:, None]
    return is_masked


class Mean:
    """The mean of a continuation's samples, added up in their order, whichever is known first: sums depend on it.

    Args:
        num_samples, length: 1 or more.
    """

    def __init__(self, num_samples: int, length: int) -> None:
        self._samples, self._tokens = np.zeros(num_samples), np.zeros(length)
        self._num_added = 0
        self._waiting: dict[int, NDArray[np.float64]] = {}

    def add(self, sample: int, log_probs: NDArray[np.float64], is_masked: NDArray[np.bool_]) -> None:
        """Add a sample: [length] log-probabilities of the tokens where it masks them, and where it does."""
        self._waiting[sample] = np.where(is_masked, log_probs, 0.0) * (len(is_masked) / is_masked.sum())
        while self._num_added in self._waiting:
            weighted = self._waiting.pop(self._num_added)
            self._samples[self._num_added] = weighted.sum()
            self._tokens += weighted
            self._num_added += 1

    def estimate(self) -> Estimate:
        """Return what all samples come to."""
        num_samples, samples = len(self._samples), self._samples
        assert self._num_added == num_samples, "some samples are missing"
        error = float(samples.std(ddof=1) / np.sqrt(num_samples)) if num_samples > 1 else float("nan")
        return Estimate(float(samples.mean()), error, (self._tokens / num_samples).tolist())


@dataclass(frozen=True, slots=True)
class Part:
    """A block of a continuation as one sample sees it, with all that is around it: a request to an engine."""

    sample: int
    begin: int  # of the block in the continuation
    prompt: list[int]  # the tokens before the block, the mask token where they are masked
    behind: list[int]  # those of the block and behind it, `OPEN` where they are masked
    targets: list[int]  # the block's tokens

    def put(self, log_probs: NDArray[np.float64], found: list[float]) -> None:
        """Write what was found of the block's tokens; [length], of the sample, is written to."""
        log_probs[self.begin : self.begin + len(found)] = found


def parts(
    context: list[int], continuation: list[int], is_masked: NDArray[np.bool_], block_length: int, mask_token_id: int
) -> Iterator[Part]:
    """Yield what has to be asked: one part of each sample, and one more for each further block in which it masks any.

    Args:
        context, continuation: token ids, one of each at least.
        is_masked: [num_samples, length].
        block_length: positions that a request scores.
        mask_token_id: what stands for a masked token.
    """
    tokens = np.array(continuation)
    for sample, masked in enumerate(is_masked):
        noisy, behind = np.where(masked, mask_token_id, tokens).tolist(), np.where(masked, OPEN, tokens).tolist()
        for begin in range(0, len(continuation), block_length):
            end = begin + block_length
            if masked[begin:end].any():
                yield Part(sample, begin, context + noisy[:begin], behind[begin:], continuation[begin:end])
