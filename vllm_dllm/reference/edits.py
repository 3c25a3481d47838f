"""What a request may ask of the logits of a step, in any order of positions. Ours: no published decoder has it.

vLLM's definitions, from left to right, are over the tokens before a position. Here they are over those that are known,
wherever they are: a step's logits are edited by the prompt and the tokens of the answer that are not masked.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Edits:
    """What a request asks; nothing by default."""

    allowed_ids: tuple[int, ...] = ()  # empty: all
    bias: tuple[tuple[int, float], ...] = ()  # ids, and what is added to their logits
    end_ids: tuple[int, ...] = ()  # may not be among the first `min_tokens` tokens of the answer
    min_tokens: int = 0
    repetition: float = 1.0  # known tokens' logits are divided by it where positive, else multiplied
    frequency: float = 0.0  # times a token's known occurrences in the answer, off its logit
    presence: float = 0.0  # off the logits of tokens that are known in the answer
    bad_words: tuple[tuple[int, ...], ...] = ()  # sequences that the answer may not have


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a sequence."""

    tokens: Tensor  # [seq_len] int64
    is_masked: Tensor  # [seq_len] bool
    prompt_len: int

    def answer(self) -> list[int | None]:
        """Return the tokens of the answer, None where they are not known."""
        pairs = zip(self.tokens.tolist(), self.is_masked.tolist(), strict=True)
        return [None if is_masked else token for token, is_masked in pairs][self.prompt_len :]

    def edited(self, logits: Tensor, is_masked: Tensor, first: int, edits: Edits) -> Tensor:
        """Return logits as a request wants those of masked positions.

        Args:
            logits: [span_len, vocab], of the positions from `first` on.
            is_masked: [span_len] bool, positions that a step may unmask.
            first: absolute position.
            edits: of the request.
        """
        if edits == Edits():
            return logits
        logits = logits.clone()
        rows = is_masked.nonzero().squeeze(-1)
        logits[rows] = self._edited(logits[rows], (first + rows - self.prompt_len).tolist(), edits)
        return logits

    def goes(self, chosen: Tensor, tokens: Tensor, first: int, edits: Edits) -> tuple[Tensor, Tensor]:
        """Return which of the chosen positions are unmasked in this step, and their tokens.

        Of the chosen ones that would complete an occurrence of a bad word together, the rightmost waits.

        Args:
            chosen: [num_chosen] int64, behind `first`.
            tokens: [num_chosen] int64.
            first: absolute position.
            edits: of the request.
        """
        places, answer = (first + chosen - self.prompt_len).tolist(), self.answer()
        for place, token in zip(places, tokens.tolist(), strict=True):
            answer[place] = token
        waiting = {
            max(place for place in places if begin <= place < begin + len(word))
            for word in edits.bad_words
            for begin in range(len(answer))
            if _is_there(word, begin, answer) and any(begin <= place < begin + len(word) for place in places)
        }
        goes = torch.tensor([place not in waiting for place in places], dtype=torch.bool)
        return chosen[goes], tokens[goes]

    def _edited(self, logits: Tensor, places: list[int], edits: Edits) -> Tensor:
        """Edit the logits [num_positions, vocab] of masked positions of the answer."""
        if edits.allowed_ids:
            others = torch.ones(logits.shape[-1], dtype=torch.bool)
            others[list(edits.allowed_ids)] = False
            logits = logits.masked_fill(others, -torch.inf)
        for token, added in edits.bias:
            logits[:, token] += added
        prompt, answer = self.tokens[: self.prompt_len].tolist(), self.answer()
        for token in {*prompt, *answer} - {None}:
            logit, count = logits[:, token], answer.count(token)
            logit = torch.where(logit > 0, logit / edits.repetition, logit * edits.repetition)
            logits[:, token] = logit - edits.frequency * count - edits.presence * (count > 0)
        for row, place in enumerate(places):
            early = edits.end_ids if place < edits.min_tokens else ()
            logits[row, [*early, *_completing(place, answer, edits.bad_words)]] = -torch.inf
        return logits


def _completing(position: int, answer: list[int | None], words: tuple[tuple[int, ...], ...]) -> list[int]:
    """Return the tokens that would complete a word at a position of the answer beside known tokens."""
    members = [(word, member) for word in words for member in range(len(word))]
    return [
        word[member]
        for word, member in members
        if _is_there(word, position - member, [*answer[:position], word[member], *answer[position + 1 :]])
    ]


def _is_there(word: tuple[int, ...], begin: int, answer: list[int | None]) -> bool:
    return begin >= 0 and answer[begin : begin + len(word)] == list(word)
