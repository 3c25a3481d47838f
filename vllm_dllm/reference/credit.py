"""CreditDecoding (arXiv:2510.06133), as dInfer's `CreditThresholdParallelDecoder` publishes it: logits with credit.

Ours: a position credits at most `MAX_CREDITED` tokens, where the published code has a matrix over the vocabulary; and
all is float64.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

MAX_CREDITED = 8


@dataclass(slots=True)
class Credits:
    """The credit that the positions of a block gave to tokens; a refresh within the block changes none of it."""

    of: dict[int, list[tuple[int, float]]] = field(default_factory=dict)  # position -> tokens and their credit

    def fuse(self, logits: Tensor, positions: Tensor, *, alpha: float, beta: float, gamma: float) -> Tensor:
        """Give credit for a step, and raise the logits of what has credit.

        Args:
            logits: [num_masked, vocab] float64.
            positions: [num_masked] int64, masked.
            alpha: of the logarithm that is added.
            beta: what is left of credit after a step.
            gamma: the power of the probability that is given.

        Returns: as `logits`.
        """
        fused = logits.clone()
        best = logits.softmax(-1).max(-1)
        for row, position in enumerate(positions.tolist()):
            credited = [(token, beta * credit) for token, credit in self.of.get(position, [])]
            token, gain = int(best.indices[row]), float(best.values[row]) ** gamma
            places = [place for place, (other, _) in enumerate(credited) if other == token]
            if places:
                credited[places[0]] = (token, credited[places[0]][1] + gain)
            elif len(credited) < MAX_CREDITED:
                credited.append((token, gain))
            else:
                credits_alone = [credit for _, credit in credited]
                credited[credits_alone.index(min(credits_alone))] = (token, gain)
            self.of[position] = credited
            tokens, values = zip(*credited, strict=True)
            fused[row, list(tokens)] += alpha * torch.log(torch.tensor(values, dtype=torch.float64) + 1)
        return fused

    def tokens(self, position: int) -> set[int]:
        """Return what a position credits."""
        return {token for token, _ in self.of.get(position, [])}
