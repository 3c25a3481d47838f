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


def edited(logits: Tensor, positions: Tensor, known: Known, edits: Edits) -> Tensor:
    """Return the logits [num_positions, vocab] of masked positions [num_positions] int64 as a request wants them."""
    if edits.allowed_ids:
        others = torch.ones(logits.shape[-1], dtype=torch.bool)
        others[list(edits.allowed_ids)] = False
        logits = logits.masked_fill(others, -torch.inf)
    logits = logits.clone()
    for token, added in edits.bias:
        logits[:, token] += added
    prompt, answer = known.tokens[: known.prompt_len].tolist(), known.answer()
    for token in {*prompt, *answer} - {None}:
        logit, count = logits[:, token], answer.count(token)
        logit = torch.where(logit > 0, logit / edits.repetition, logit * edits.repetition)
        logits[:, token] = logit - edits.frequency * count - edits.presence * (count > 0)
    for row, position in enumerate((positions - known.prompt_len).tolist()):
        early = edits.end_ids if position < edits.min_tokens else ()
        logits[row, [*early, *_completing(position, answer, edits.bad_words)]] = -torch.inf
    return logits


def _completing(position: int, answer: list[int | None], words: tuple[tuple[int, ...], ...]) -> list[int]:
    """Return the tokens that would complete a word at a position of the answer beside known tokens."""
    members = [(word, member) for word in words for member in range(len(word))]
    return [
        word[member]
        for word, member in members
        if _is_there(word, position - member, [*answer[:position], word[member], *answer[position + 1 :]])
    ]


def held(tokens: Tensor, positions: Tensor, known: Known, edits: Edits) -> Tensor:
    """Say which positions [num_positions] int64 wait, since their tokens would complete a bad word with others'.

    Of the positions that would complete an occurrence of a word together, the rightmost waits; bool.
    """
    places, answer = (positions - known.prompt_len).tolist(), known.answer()
    for place, token in zip(places, tokens.tolist(), strict=True):
        answer[place] = token
    waiting = {
        max(place for place in places if begin <= place < begin + len(word))
        for word in edits.bad_words
        for begin in range(len(answer))
        if _is_there(word, begin, answer) and any(begin <= place < begin + len(word) for place in places)
    }
    return torch.tensor([place in waiting for place in places])


def _is_there(word: tuple[int, ...], begin: int, answer: list[int | None]) -> bool:
    return begin >= 0 and answer[begin : begin + len(word)] == list(word)
