"""How likely a draft's tokens are beside those that became known behind the distribution that they are from."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a graph file is read where torch is not loaded
    from torch import Tensor

OFFSETS = (-1, 1, -2, 2)
"""Where the neighbours are that a position sees."""

NONE = -1
"""In place of a neighbour's token: it was known when the distribution was made, is masked, or outside the block."""

LEAST_LOG_PROB = -20.0
"""Less probable candidates, impossible ones among them, count as this probable."""


@dataclass(frozen=True, slots=True)
class TokenWeights:
    """Scores of a position's candidates, as calibrated; the default orders them by probability alone.

    `(slope + slope_beside_new * (a neighbour at distance 1 is new)) * log(probability)`, and for each neighbour that is
    new and has the candidate's token `same` at its place in `OFFSETS`; an impossible candidate, whatever its id is, has
    none. A distribution that is older than a neighbour's token still offers that token beside it, where it seldom
    comes. The softmax of the scores is the chance of each. They decide which drafts are made at temperature 0; at
    another one the decoder's noise does.
    """

    slope: float = 1.0
    slope_beside_new: float = 0.0
    same: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)

    def scores(self, token_ids: "Tensor", log_probs: "Tensor", beside: "Tensor") -> "Tensor":
        """Return the scores of candidates, which are linear in the weights; [..., num_candidates] float64.

        Args:
            token_ids: [..., num_candidates] int64.
            log_probs: [..., num_candidates] float64, of these tokens.
            beside: [..., len(OFFSETS)] int64, tokens of the new neighbours, and NONE.
        """
        is_possible = log_probs > -math.inf
        is_beside_new = (beside[..., :2] != NONE).any(-1, keepdim=True)
        scale = self.slope + self.slope_beside_new * is_beside_new.double()
        added = is_beside_new.double() * 0.0
        for weight, token in zip(self.same, beside.unbind(-1), strict=True):
            added = added + weight * (is_possible & (token_ids == token[..., None])).double()
        return scale * log_probs.where(log_probs > LEAST_LOG_PROB, LEAST_LOG_PROB) + added
