"""An order ranker: a small net that says, better than confidence, which masked positions the next steps unmask.

`draft.readiness` knows of a position its confidence and which neighbours are new. A ranker reads the whole block: all
candidates' probabilities, what is known, how far the block is. It adds to the readiness of each position, and to what
each neighbour adds once it becomes known, so that one pass over a root serves every node that drafts make of it.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, pad

from vllm_dllm.draft.graph import MAX_CANDIDATES
from vllm_dllm.draft.ranker_shape import KERNEL, NUM_FEATURES, REACH, Weights
from vllm_dllm.draft.readiness import logit

WIDTH = 32
DROPOUT = 0.2
_MOST = 1e6
"""What a ranker adds is at most so large: no weights may make a readiness infinite."""


class OrderRanker(nn.Module):
    """Three convolutions over the positions of a block; new, it adds nothing to readiness.

    They are products of matrices and not cuDNN's, which may choose another algorithm on each rank: all ranks must make
    the same drafts.

    Args:
        width: of the hidden layers.
    """

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.read = nn.Linear(NUM_FEATURES * KERNEL, width)
        self.mix = nn.Linear(width * KERNEL, width)
        self.write = nn.Linear(width * KERNEL, 1 + 2 * REACH)
        self.dropout = nn.Dropout(DROPOUT)
        nn.init.zeros_(self.write.weight)
        nn.init.zeros_(self.write.bias)

    @classmethod
    def of(cls, weights: Weights) -> "OrderRanker":
        """Make one of the weights of a file, which are checked there."""
        ranker = cls(len(weights["read.bias"]))
        ranker.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
        return ranker.eval()

    @property
    def weights(self) -> Weights:
        """What `of` makes a ranker of."""
        return {name: tensor.cpu().numpy() for name, tensor in self.state_dict().items()}

    def forward(self, features: Tensor) -> Tensor:
        """Return what is added to the readiness of each position.

        Args:
            features: [num_roots, block_length, NUM_FEATURES] float32, of `root_features`.

        Returns: [num_roots, block_length, 1 + 2 * REACH] float32, the `terms` of `Readiness`.
        """
        hidden = self.dropout(gelu(self.read(_windows(features))))
        hidden = self.dropout(hidden + gelu(self.mix(_windows(hidden))))
        terms: Tensor = self.write(_windows(hidden))
        return terms

    @torch.no_grad()
    def terms(self, log_probs: Tensor, is_masked: Tensor, is_new: Tensor) -> Tensor:
        """Return what drafts take from the ranker, [num_roots, block_length, 1 + 2 * REACH] float64.

        Args:
            log_probs, is_masked, is_new: as in `root_features`.
        """
        found: Tensor = self(root_features(log_probs, is_masked, is_new)).double()
        return found.nan_to_num(0.0, _MOST, -_MOST).clamp(-_MOST, _MOST)


def root_features(log_probs: Tensor, is_masked: Tensor, is_new: Tensor) -> Tensor:
    """Describe the positions of roots, [num_roots, block_length, NUM_FEATURES] float32.

    Args:
        log_probs: [num_roots, block_length, num_candidates] float64, of the step that made the root, descending.
        is_masked: [num_roots, block_length] bool, of the root.
        is_new: [num_roots, block_length] bool, unmasked by that step.
    """
    log_probs = log_probs[..., :MAX_CANDIDATES].float().clamp(-20.0, 0.0)
    first, second = log_probs[..., 0], log_probs[..., 1]
    confidence = logit(first)
    masked = confidence.masked_fill(~is_masked, -torch.inf)
    behind = (confidence - masked.amax(1, keepdim=True)).clamp(-15.0, 15.0)
    rank = (masked[:, None] > masked[..., None]).sum(-1)
    place = torch.linspace(0.0, 1.0, first.shape[1], device=first.device).expand_as(first)
    return torch.stack(
        (
            confidence / 5.0,
            -(log_probs.exp() * log_probs).sum(-1),
            (first - second).clamp(max=10.0) / 5.0,
            second.clamp(min=-10.0) / 5.0,
            behind / 5.0,
            1.0 / (1.0 + rank),
            is_masked.float(),
            is_new.float(),
            place,
            is_masked.float().mean(1, keepdim=True).expand_as(first),
        ),
        -1,
    )


def _windows(rows: Tensor) -> Tensor:
    """Put the rows around each position together.

    Args:
        rows: [num_roots, block_length, width].

    Returns: [num_roots, block_length, width * KERNEL].
    """
    return pad(rows, (0, 0, KERNEL // 2, KERNEL // 2)).unfold(1, KERNEL, 1).flatten(2)
