"""How ready a masked position is to be unmasked next."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a graph file is read where torch is not loaded
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Readiness:
    """Log-odds of being unmasked by the next step, as calibrated; the default orders by confidence alone.

    `slope * logit(confidence) + near[d - 1] * (neighbours at distance d that were just unmasked) + bias`: a neighbour
    that has just become known makes a position likelier than the confidence says, which does not know of it. `bias`
    matters where the number of positions per step varies.
    """

    slope: float = 1.0
    near: tuple[float, float] = (0.0, 0.0)
    bias: float = 0.0

    def log_odds(self, log_confidence: "Tensor", is_new: "Tensor") -> "Tensor":
        """Return the readiness of each position.

        Args:
            log_confidence: [..., block_length] float64, logarithm of the confidence.
            is_new: [..., block_length] bool, positions that were just unmasked.
        """
        below_zero = log_confidence.clamp(max=-1e-12)
        logit = below_zero - (-below_zero.expm1()).log()
        return self.slope * logit + self.near_new(is_new) + self.bias

    def near_new(self, is_new: "Tensor") -> "Tensor":
        """Return the part of the newly unmasked neighbours, float64, for `is_new` [..., block_length] bool."""
        found = is_new.double()
        near = found * 0.0
        for distance, weight in enumerate(self.near, start=1):
            near[..., distance:] += weight * found[..., :-distance]
            near[..., :-distance] += weight * found[..., distance:]
        return near


BY_CONFIDENCE = Readiness()
