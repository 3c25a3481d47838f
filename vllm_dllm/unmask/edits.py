"""What requests ask of their rows' logits before those are reduced, as tensor code over rows.

Edits are sparse: for each row some ids and what becomes of their logits. Lists of ids are padded with the mask token,
whose logit is left out of every reduction, whatever is written there.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Penalties:
    """Penalties of tokens that are known in the sequences of some canvases: vLLM's, over prompt and answer."""

    ids: Tensor  # [num_canvases, length] int64, the known tokens, more than once where they occur so
    num_generated: Tensor  # [num_canvases, length] float32, how often each occurs in the answer
    repetition: Tensor  # [num_canvases] float32, 1 for none
    frequency: Tensor  # [num_canvases] float32, 0 for none
    presence: Tensor  # [num_canvases] float32, 0 for none

    def apply(self, logits: Tensor, canvas: Tensor) -> None:
        """Change logits [num_rows, vocab_size] float32 of rows of canvases [num_rows] int64."""
        ids, count = self.ids[canvas], self.num_generated[canvas]
        repetition, frequency, presence = (each[canvas, None] for each in self._factors)
        known = logits.gather(1, ids)
        known = torch.where(known > 0, known / repetition, known * repetition)
        known = known - frequency * count - presence * (count > 0)
        logits.scatter_(1, ids, known)  # an id that occurs twice is written the same value twice

    @property
    def _factors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.repetition, self.frequency, self.presence


@dataclass(frozen=True, slots=True)
class RowEdits:
    """The edits of some rows, in vLLM's order; None spares a stage that no request asks for."""

    canvas: Tensor  # [num_rows] int64, whose lists below are a row's
    is_edited: Tensor  # [num_rows] bool; the lists of the others change nothing
    covers_all: bool  # whether all rows are edited, as the host knows
    allowed: tuple[Tensor, Tensor] | None = None  # ids [num_canvases, n] int64, and who has any, [num_canvases] bool
    bias: tuple[Tensor, Tensor] | None = None  # ids [num_canvases, n] int64, and what is added, float32
    penalties: Penalties | None = None
    barred: Tensor | None = None  # [num_rows, n] int64, ids that may not be chosen
    min_p: Tensor | None = None  # [num_rows] float64, as in `RowSampling`

    def rows(self, begin: int, end: int) -> "RowEdits":
        """Return those of rows [begin, end)."""
        return self.take(torch.arange(begin, end, device=self.canvas.device))

    def take(self, row: Tensor) -> "RowEdits":
        """Return those of some rows, [n] int64."""
        return replace(
            self,
            canvas=self.canvas[row],
            is_edited=self.is_edited[row],
            barred=None if self.barred is None else self.barred[row],
            min_p=None if self.min_p is None else self.min_p[row],
        )

    def apply(self, logits: Tensor) -> Tensor:
        """Return the rows' logits [num_rows, vocab_size] edited, float32; they may be overwritten."""
        logits = logits.float()
        if self.allowed is not None:
            ids = self.allowed[0][self.canvas]
            kept = logits.gather(1, ids)
            logits.masked_fill_(self.allowed[1][self.canvas, None], -torch.inf).scatter_(1, ids, kept)
        if self.bias is not None:
            ids, added = (each[self.canvas] for each in self.bias)
            logits.scatter_add_(1, ids, added)
        if self.penalties is not None:
            self.penalties.apply(logits, self.canvas)
        if self.barred is not None:
            logits.scatter_(1, self.barred, -torch.inf)
        return logits


@dataclass(frozen=True, slots=True)
class BadWords:
    """Where bad words may be completed in some canvases.

    A word's occurrence begins at any position from `length - 1` before the block to its last one; a window holds what
    all of them look at. Nothing matches what is not known.
    """

    words: Tensor  # [num_canvases, num_words, length] int64, -1 behind the end of a word and in words that are none
    window: Tensor  # [num_canvases, block_length + 2 (length - 1)] int64, answer tokens, the mask token for all else
    mask_token_id: int

    def barred(self) -> Tensor:
        """Return the ids that would complete a word beside known tokens; [num_canvases, block_length, n] int64."""
        length = self.words.shape[2]
        block_length = self.window.shape[1] - 2 * (length - 1)
        seen = self._seen(self.window)
        fits = self._fits(seen)
        lacks_one = (~fits).sum(-1) == 1
        barred = []
        for member in range(length):
            first = length - 1 - member
            begun_at = slice(first, first + block_length)
            is_missing = lacks_one[:, :, begun_at] & ~fits[:, :, begun_at, member]
            token = self.words[:, :, member, None].expand(is_missing.shape)
            barred.append(torch.where(is_missing, token, self.mask_token_id).transpose(1, 2))
        return torch.cat(barred, 2)

    def held(self, tokens: Tensor, chosen: Tensor) -> Tensor:
        """Return the chosen positions whose tokens would complete a word together with those of others left of them.

        Args:
            tokens: [num_canvases, block_length] int64, what the positions would take.
            chosen: [num_canvases, block_length] bool.

        Returns: of each occurrence, the rightmost of its chosen positions; [num_canvases, block_length] bool.
        """
        length, block_length = self.words.shape[2], tokens.shape[1]
        filled = self.window.clone()
        own = filled[:, length - 1 : length - 1 + block_length]
        own.copy_(torch.where(chosen, tokens, own))
        was_chosen = torch.zeros_like(filled, dtype=torch.bool)
        was_chosen[:, length - 1 : length - 1 + block_length] = chosen
        is_member = was_chosen.unfold(1, length, 1)[:, None] & (self.words >= 0)[:, :, None]
        complete = self._fits(self._seen(filled)).all(-1) & (is_member.sum(-1) > 1)
        held = torch.zeros_like(chosen)
        for member in range(length):
            first = length - 1 - member
            begun_at = slice(first, first + block_length)
            is_last = is_member[:, :, begun_at, member] & ~is_member[:, :, begun_at, member + 1 :].any(-1)
            held |= (complete[:, :, begun_at] & is_last).any(1)
        return held

    def _seen(self, window: Tensor) -> Tensor:
        """Return what each occurrence looks at; [num_canvases, 1, num_occurrences, length] int64."""
        return window.unfold(1, self.words.shape[2], 1)[:, None]

    def _fits(self, seen: Tensor) -> Tensor:
        """Tell which members are there, those behind a word's end among them."""
        words = self.words[:, :, None]
        return (seen == words) | (words < 0)

    def of(self, canvas: Tensor) -> "BadWords":
        """Return those of some canvases, [n] int64."""
        return replace(self, words=self.words[canvas], window=self.window[canvas])
