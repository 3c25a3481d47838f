"""How likely each candidate of a position is the token that it gets: more than its probability says.

A draft's tokens come from a distribution that is some steps old. What a position gets, once it is unmasked, depends on
what its neighbours got meanwhile. Each rule here gives the candidates of a position new log-probabilities; `features`
has what they are made of: those of token weights (`draft.token_weights`), and pairs of tokens that the text has.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_dllm.calibrate.fit import STEPS_AHEAD
from vllm_dllm.calibrate.tokens import features as features_of_weights
from vllm_dllm.calibrate.tokens import fit_choice, unmasked
from vllm_dllm.calibrate.trace import PromptTrace
from vllm_dllm.draft.token_weights import NONE

FEATURES = {
    "probability": (0,),
    "probability beside a new token": (1,),
    "same as a new neighbour": (2, 3, 4, 5),
    "pair with a new neighbour in the text": (6, 7),
}
"""Name -> columns of `features`."""

MARGINS = (0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 8.0)
"""Bounds of the bins of `fit_by_margin`: log-probability of the first candidate less that of the second."""

Odds = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""From candidates' token_ids and log_probs [..., num_candidates], the new neighbours' tokens [..., len(OFFSETS)] and
the text's pairs to log-probabilities [..., num_candidates] float64."""

Texts = Mapping[tuple[int, int], Tensor]
"""Prompt and start of a block -> the `pairs` of what was known when it began."""


def pairs(tokens: Sequence[int]) -> Tensor:
    """Return which tokens follow each other, as numbers; [num_pairs] int64."""
    text = torch.tensor(tokens, dtype=torch.int64)
    return pair(text[:-1], text[1:]).unique()


def pair(first: Tensor, second: Tensor) -> Tensor:
    """Return the number of two tokens."""
    return (first << 32) + second


def texts_of(
    traces: Sequence[PromptTrace], prompts: Sequence[Sequence[int]], *, is_prompt_alone: bool = False
) -> Texts:
    """Return the pairs of tokens that were known at the beginning of each block: of the prompt and the blocks before.

    Args:
        traces: of some of the prompts.
        prompts: tokens, by `prompt_idx`.
        is_prompt_alone: leave out the blocks before.
    """
    found = {}
    for trace in traces:
        known = list(prompts[trace.prompt_idx])
        for block in trace.blocks:
            known = known[: block.start]
            found[trace.prompt_idx, block.start] = pairs(prompts[trace.prompt_idx] if is_prompt_alone else known)
            known += block.canvas[-1].tolist()
    return found


def features(token_ids: Tensor, log_probs: Tensor, beside: Tensor, text: Tensor) -> Tensor:
    """Describe candidates; [..., num_candidates, 8] float64. Arguments: as of `Odds`."""
    is_new = beside != NONE
    left, right = beside[..., 0, None], beside[..., 1, None]
    seen = (
        torch.isin(pair(left, token_ids), text) & is_new[..., 0, None],
        torch.isin(pair(token_ids, right), text) & is_new[..., 1, None],
    )
    weighed = features_of_weights(token_ids, log_probs, beside)
    return torch.cat([weighed, torch.stack([each.double() for each in seen], -1)], -1)


def plain(token_ids: Tensor, log_probs: Tensor, beside: Tensor, text: Tensor) -> Tensor:
    """Take the probabilities as they are, as drafts without token weights do."""
    return log_probs


@dataclass(frozen=True, slots=True)
class Weighed:
    """A softmax of weighed features; `weights` [8] float64."""

    weights: Tensor

    def __call__(self, token_ids: Tensor, log_probs: Tensor, beside: Tensor, text: Tensor) -> Tensor:
        """See `Odds`."""
        return (features(token_ids, log_probs, beside, text) @ self.weights).log_softmax(-1)


@dataclass(frozen=True, slots=True)
class ByMargin:
    """How often each candidate came true, by margin and whether a token beside is new.

    `log_shares` [2, 1 + len(MARGINS), num_candidates] float64.
    """

    log_shares: Tensor

    def __call__(self, token_ids: Tensor, log_probs: Tensor, beside: Tensor, text: Tensor) -> Tensor:
        """See `Odds`."""
        return self.log_shares[_margin_bins(log_probs, beside)]


def _margin_bins(log_probs: Tensor, beside: Tensor) -> tuple[Tensor, Tensor]:
    margin = (log_probs[..., 0] - log_probs[..., 1]).contiguous()
    is_beside_new = (beside[..., :2] != NONE).any(-1)
    return is_beside_new.long(), torch.bucketize(margin, torch.tensor(MARGINS, dtype=torch.float64))


@dataclass(frozen=True, slots=True)
class Examples:
    """Positions that were unmasked within `STEPS_AHEAD` steps behind a root, with a token that was a candidate there.

    Attributes:
        log_probs: [num_examples, num_candidates] float64.
        beside: [num_examples, len(OFFSETS)] int64.
        features: [num_examples, num_candidates, 8] float64.
        truth: [num_examples] int64, the candidate that came.
    """

    log_probs: Tensor
    beside: Tensor
    features: Tensor
    truth: Tensor

    @property
    def num_first(self) -> int:
        """At how many the first candidate came."""
        return int((self.truth == 0).sum())


def make_examples(traces: Sequence[PromptTrace], texts: Texts, mask_token_id: int) -> Examples:
    """Read examples from traces."""
    parts = []
    for block, text in ((block, texts[trace.prompt_idx, block.start]) for trace in traces for block in trace.blocks):
        found = unmasked(block, mask_token_id, STEPS_AHEAD)
        is_it = found.token_ids == found.came[:, None]
        described = features(found.token_ids, found.log_probs, found.beside, text)
        rows = (found.log_probs, found.beside, described, is_it.byte().argmax(1))
        parts.append(tuple(row[is_it.any(1)] for row in rows))
    return Examples(*map(torch.cat, zip(*parts, strict=True)))


def fit_weights(examples: Examples, names: Sequence[str]) -> Weighed:
    """Return the weights of the named features that make what came likeliest; those of the others are 0."""
    columns = [column for name in names for column in FEATURES[name]]
    found = fit_choice(examples.features[..., columns], examples.truth)
    weights = torch.zeros(examples.features.shape[-1], dtype=torch.float64)
    return Weighed(weights.index_put((torch.tensor(columns),), found))


def fit_by_margin(examples: Examples) -> ByMargin:
    """Count how often each candidate came, with a tenth of an observation more."""
    num_candidates = examples.log_probs.shape[-1]
    counts = torch.full((2, 1 + len(MARGINS), num_candidates), 0.1, dtype=torch.float64)
    bins = _margin_bins(examples.log_probs, examples.beside)
    ones = torch.ones(len(examples.truth), dtype=torch.float64)
    counts.index_put_((*bins, examples.truth), ones, accumulate=True)
    return ByMargin((counts / counts.sum(-1, keepdim=True)).log())
