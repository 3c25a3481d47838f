"""Log-probabilities of tokens that were unmasked, each by the row that unmasked it.

Rows are taken again, a few of each request that asks: those of the accept path where a position was unmasked. Their
distribution is softmax(logits) over the tokens that the position could take: as the request edits logits and as its
constraint forbids tokens, without the mask token, before temperature and filters.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from vllm_dllm.ops.vocab_stats import RowIds
from vllm_dllm.unmask.guidance import wanted_logits
from vllm_dllm.unmask.head import TORCH_BYTES
from vllm_dllm.unmask.stats import unpacked
from vllm_dllm.unmask.walk import Nodes, Trajectory

MAX_LOGPROBS = 20
"""Most of a row's likeliest tokens that a request may ask for: OpenAI's bound."""


Index = tuple[Tensor | int, ...]


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities of some tokens, and of the likeliest in their places."""

    token_ids: Tensor  # [..., 1 + num_top] int32, the token, then the likeliest, likeliest first
    log_probs: Tensor  # [..., 1 + num_top] float32; -inf: could not be taken
    ranks: Tensor  # [...] int32 of the token, from 1

    @classmethod
    def empty(cls, *shape: int, device: torch.device) -> "TokenLogprobs":
        """Return those of a shape whose last dimension is `1 + num_top`."""
        ids = torch.zeros(shape, dtype=torch.int32, device=device)
        return cls(ids, torch.zeros(shape, device=device), torch.zeros_like(ids[..., 0]))

    def put(self, index: Index, values: "TokenLogprobs") -> None:
        """Write values at an index of all dimensions but the last, of which there may be fewer entries."""
        width = values.token_ids.shape[-1]
        self.token_ids[..., :width][index] = values.token_ids
        self.log_probs[..., :width][index] = values.log_probs
        self.ranks[index] = values.ranks

    def of(self, index: Index, width: int) -> "TokenLogprobs":
        """Return a copy of those at an index, with `width` entries of each."""
        return TokenLogprobs(self.token_ids[..., :width][index], self.log_probs[..., :width][index], self.ranks[index])

    def where(self, is_own: Tensor, other: "TokenLogprobs") -> "TokenLogprobs":
        """Return these where `is_own` [...] bool says so, else the other ones."""
        return TokenLogprobs(
            torch.where(is_own[..., None], self.token_ids, other.token_ids),
            torch.where(is_own[..., None], self.log_probs, other.log_probs),
            torch.where(is_own, self.ranks, other.ranks),
        )

    def cleared(self, where: Tensor) -> "TokenLogprobs":
        """Return these without those that `where` [...] bool marks: their rank is 0."""
        return replace(self, ranks=self.ranks.masked_fill(where, 0))

    def given(self, tokens: Tensor) -> "TokenLogprobs":
        """Return these, and where there are none, tokens [...] int64 that are certain."""
        ids = tokens[..., None].int().expand_as(self.token_ids)
        # All places of such a token have it, and who reads them by token finds the last one.
        certain = TokenLogprobs(ids, torch.zeros_like(self.log_probs), torch.ones_like(self.ranks))
        return certain.where(self.ranks == 0, self)

    def view(self, *shape: int) -> "TokenLogprobs":
        """Return the same in another shape, without the last dimension."""
        return TokenLogprobs(self.token_ids.view(*shape, -1), self.log_probs.view(*shape, -1), self.ranks.view(shape))


class LogprobHead:
    """Makes log-probabilities of rows.

    Args:
        head_logits: maps hidden rows to logits of the whole vocabulary [num_rows, num_ids], which may be overwritten.
        num_ids: ids of a row.
        mask_token_id: the id that is never chosen; None: any may be.
    """

    def __init__(self, head_logits: Callable[[Tensor], Tensor], num_ids: int, mask_token_id: int | None) -> None:
        self._head_logits, self._mask_token_id = head_logits, mask_token_id
        self._chunk_rows = max(1, TORCH_BYTES // (8 * num_ids))

    def __call__(
        self,
        hidden: Tensor,
        token_ids: Tensor,
        num_top: int,
        ids: RowIds | None = None,
        keeps_mask: Tensor | None = None,
    ) -> TokenLogprobs:
        """Return log-probabilities of each row's token and of its likeliest ones.

        Args:
            hidden: [num_rows, hidden_size].
            token_ids: [num_rows] int64.
            num_top: 0 to `MAX_LOGPROBS`.
            ids: which ids the rows may take; None: all.
            keeps_mask: [num_rows] bool, whose distribution has the mask token too; None: no row's.
        """
        keeps_mask = torch.zeros_like(token_ids, dtype=torch.bool) if keeps_mask is None else keeps_mask
        done = TokenLogprobs.empty(len(hidden), 1 + num_top, device=hidden.device)
        for begin in range(0, len(hidden), self._chunk_rows):
            row = torch.arange(begin, min(begin + self._chunk_rows, len(hidden)), device=hidden.device)
            found = self._of_chunk(hidden[row], token_ids[row], num_top, ids and ids.of(row), keeps_mask[row])
            done.put((row,), found)
        return done

    def _of_chunk(
        self, hidden: Tensor, token_ids: Tensor, num_top: int, ids: RowIds | None, keeps_mask: Tensor
    ) -> TokenLogprobs:
        logits = wanted_logits(self._head_logits, hidden, ids).float()
        if ids is not None and ids.allowed is not None:
            logits.masked_fill_(~unpacked(ids.allowed, logits.shape[1]), -torch.inf)
        if self._mask_token_id is not None:
            logits[:, self._mask_token_id].masked_fill_(~keeps_mask, -torch.inf)
        log_probs = logits.double().log_softmax(1)
        own = log_probs.gather(1, token_ids[:, None])
        num_found = min(num_top, logits.shape[1])
        top, top_ids = log_probs.topk(num_found, dim=1)
        missing = (0, num_top - num_found)
        return TokenLogprobs(
            torch.cat([token_ids[:, None], pad(top_ids, missing)], 1).int(),
            torch.cat([own, pad(top, missing, value=-torch.inf)], 1).float(),
            (1 + (log_probs > own).sum(1)).int(),
        )


@dataclass(frozen=True, slots=True)
class Unmasked:
    """Where some requests unmasked a token in a step, in their block and, behind a look-ahead, in the next one."""

    row: Tensor  # [num_asking, 1 or 2, block_length] int64, of the step's evaluated rows
    token_ids: Tensor  # [num_asking, 1 or 2, block_length] int64
    is_new: Tensor  # [num_asking, 1 or 2, block_length] bool; what the others say means nothing

    @classmethod
    def of(cls, nodes: Nodes, done: Trajectory, request: Tensor, mask_token_id: int) -> "Unmasked":
        """Find those of requests [num_asking] int64 in a step: what it evaluated, and what came of it."""
        evaluated, block_length = nodes.evaluated, nodes.canvas.shape[-1]
        if evaluated is None:
            evaluated = torch.arange(nodes.depth.numel(), device=nodes.depth.device).view_as(nodes.depth)
        evaluated, place = evaluated[request], done.step[request]
        node = [done.path[request].gather(1, place.clamp(min=0)).clamp(min=0)]
        tokens, is_new = [done.canvas[request]], [place >= 0]
        if nodes.end is not None:
            behind = done.next_canvas[request]
            node.append(torch.full_like(place, nodes.canvas.shape[1] - 1))
            tokens.append(behind)
            is_new.append(done.came_over[request, None] & (behind != mask_token_id))
        first = evaluated.gather(1, torch.cat(node, 1)).clamp(min=0).view(len(request), -1, block_length) * block_length
        offset = torch.arange(block_length, device=first.device)
        return cls(first + offset, torch.stack(tokens, 1), torch.stack(is_new, 1))

    def log_probs(
        self, head: LogprobHead, hidden: Tensor, ids: RowIds | None, num_top: int, keeps_mask: Tensor
    ) -> TokenLogprobs:
        """Return those of the tokens; [num_asking, 1 or 2, block_length, 1 + num_top].

        Args:
            head: makes them.
            hidden: [num_evaluated * block_length, hidden_size].
            ids: which ids these rows may take.
            num_top: likeliest tokens of each.
            keeps_mask: [num_asking] bool, in whose distributions the mask token stays.
        """
        # Which of them are new the host would have to wait for, but on a CPU.
        is_new = self.is_new.flatten()
        index = is_new.nonzero().squeeze(1) if is_new.is_cpu else torch.arange(is_new.numel(), device=is_new.device)
        row, token_ids = self.row.flatten()[index], self.token_ids.flatten()[index]
        keeps = keeps_mask[:, None, None].expand_as(self.row).flatten()[index]
        done = TokenLogprobs.empty(is_new.numel(), 1 + num_top, device=is_new.device)
        done.put((index,), head(hidden[row], token_ids, num_top, ids and ids.of(row), keeps))
        return done.view(*self.row.shape)
