"""How ready a masked position is to be unmasked next."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_dllm.draft.ranker_shape import REACH

if TYPE_CHECKING:  # a graph file is read where torch is not loaded
    from torch import Tensor


def logit(log_confidence: "Tensor") -> "Tensor":
    """Return the log-odds of a confidence, given its logarithm."""
    below_zero = log_confidence.clamp(max=-1e-12 if log_confidence.dtype.itemsize > 4 else -1e-7)
    return below_zero - (-below_zero.expm1()).log()


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

    def log_odds(self, log_confidence: "Tensor", is_new: "Tensor", terms: "Tensor | None" = None) -> "Tensor":
        """Return the readiness of each position.

        Args:
            log_confidence: [..., block_length] float64, logarithm of the confidence.
            is_new: [..., block_length] bool, positions that were just unmasked.
            terms: as in `near_new`; the middle one is added to the readiness itself.
        """
        ready = self.slope * logit(log_confidence) + self.near_new(is_new, terms) + self.bias
        return ready if terms is None else ready + terms[..., REACH]

    def near_new(self, is_new: "Tensor", terms: "Tensor | None" = None) -> "Tensor":
        """Return the part of the newly unmasked neighbours, float64.

        Args:
            is_new: [..., block_length] bool.
            terms: [..., block_length, 1 + 2 * REACH] float64, what a ranker (`draft.ranker`) adds: entry REACH + d to
                the weight of the neighbour that is d positions behind; None adds nothing.
        """
        found = is_new.double()
        near = found * 0.0
        for distance, weight in enumerate(self.near, start=1):
            near[..., distance:] += weight * found[..., :-distance]
            near[..., :-distance] += weight * found[..., distance:]
        if terms is None:
            return near
        for distance in range(1, 1 + REACH):
            before, behind = terms[..., distance:, REACH - distance], terms[..., :-distance, REACH + distance]
            near[..., distance:] += before * found[..., :-distance]
            near[..., :-distance] += behind * found[..., distance:]
        return near


BY_CONFIDENCE = Readiness()
