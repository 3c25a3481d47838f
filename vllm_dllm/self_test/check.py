"""What one comparison found."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Check:
    """A kernel against plain torch in one case."""

    kernel: str  # "attention csrc", or the name of an op
    case: str
    error: float  # in the kernel's own measure, NaN where it gave NaN
    allowed: float  # largest error of a right kernel

    @property
    def agrees(self) -> bool:
        """Whether the kernel may serve."""
        return self.error <= self.allowed  # not so for NaN

    def __str__(self) -> str:
        """Return the figures."""
        return f"{self.kernel}, {self.case}: error {self.error:.2g}, allowed {self.allowed:.2g}"


def worst(checks: Iterable[Check]) -> Check:
    """Return the check whose error is the largest share of what is allowed; NaN is larger than any."""
    return max(checks, key=lambda check: (not check.agrees, check.error / (check.allowed or 1e-300)))


def row_error(found: Tensor, expected: Tensor) -> float:
    """Return the largest norm of a row's difference, relative to that of the row; rows are [num_rows, ...].

    A row that is 0 in both differs by 0.
    """
    difference = (found.double() - expected.double()).flatten(1).norm(dim=1)
    size = expected.double().flatten(1).norm(dim=1)
    return float((difference / size.clamp(min=torch.finfo(torch.float64).tiny)).max()) if len(found) else 0.0


def share_unequal(found: Tensor, expected: Tensor) -> float:
    """Return the share of places at which two tensors of one shape are not equal; 1 for different shapes."""
    if found.shape != expected.shape:
        return 1.0
    return float((found != expected).double().mean()) if found.numel() else 0.0


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference of places, relative to what is expected there but at least to 1; inf equals inf."""
    error = (found.double() - expected.double()).abs() / expected.double().abs().clamp(min=1.0)
    return float(torch.where(found == expected, 0.0, error).max()) if found.numel() else 0.0
