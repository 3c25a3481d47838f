"""Statistics of a vocabulary: our kernel against logits, softmax and topk in torch."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.kernels.floor import Rates
from benchmarks.kernels.turns import Contestant, UnequalResultsError, num_data_sets
from vllm_dllm import ops

NUM_CANDIDATES = 8


@dataclass(frozen=True, slots=True)
class VocabShape:
    """Hidden rows and the weight of an LM head."""

    vocab_size: int
    hidden_size: int
    num_rows: int
    dtype: torch.dtype

    @property
    def logits_bytes(self) -> int:
        """Bytes of the logits of all rows in float32."""
        return 4 * self.num_rows * self.vocab_size

    @property
    def weight_bytes(self) -> int:
        """Bytes of the LM head's weight."""
        return self.vocab_size * self.hidden_size * self.dtype.itemsize

    def floor_ms(self, rates: Rates) -> float:
        """Return the time that reading the weight once, or the product with it, takes at best."""
        return rates.floor_ms(self.weight_bytes, 2.0 * self.num_rows * self.vocab_size * self.hidden_size)


class VocabProblem:
    """Data of a shape; the last id stands for the mask token."""

    def __init__(self, shape: VocabShape, device: torch.device) -> None:
        self.shape, self.device = shape, device
        self.num_sets = num_data_sets(shape.weight_bytes)
        randn = partial(torch.randn, device=device, dtype=shape.dtype)
        self.rows = randn(shape.num_rows, shape.hidden_size)
        self.weights = randn(self.num_sets, shape.vocab_size, shape.hidden_size)
        self.weights *= 4 / shape.hidden_size**0.5
        self.mask_id = shape.vocab_size - 1


def contestants(problem: VocabProblem) -> dict[str, Contestant]:
    """Return our op and torch, after comparing the best ids, where no rounding can change them.

    Raises: UnequalResultsError.
    """
    found: dict[str, Callable[[int], Tensor]] = {"csrc": _csrc(problem), "torch": _torch(problem)}
    best, second = _torch_probs(problem, 0).topk(2).values.log().unbind(1)
    is_clear = best - second > 64 * torch.finfo(problem.shape.dtype).eps  # logits are some 4 * 4 at most
    is_wrong = is_clear & (found["csrc"](0) != found["torch"](0))
    if is_wrong.any():
        raise UnequalResultsError(f"{problem.shape}: csrc and torch differ in {int(is_wrong.sum())} rows")
    return dict(found)


def _csrc(problem: VocabProblem) -> Callable[[int], Tensor]:
    def best_ids(number: int) -> Tensor:
        stats = ops.vocab_stats(
            problem.rows,
            problem.weights[number],
            first_id=0,
            excluded_ids=(problem.mask_id,),
            num_candidates=NUM_CANDIDATES,
            sampling=None,
        )
        return stats.top_ids[:, 0]

    return best_ids


def _torch(problem: VocabProblem) -> Callable[[int], Tensor]:
    def best_ids(number: int) -> Tensor:
        return _torch_probs(problem, number).topk(NUM_CANDIDATES).indices[:, 0]

    return best_ids


def _torch_probs(problem: VocabProblem, number: int) -> Tensor:
    logits = (problem.rows @ problem.weights[number].T).float()
    logits[:, problem.mask_id] = -torch.inf
    return logits.softmax(1)
