"""WeDLM's decoder, as published (Tencent/WeDLM `wedlm_decoder.py` and `sampler.py`, arXiv:2512.22737).

A *window* of positions slides over the answer. Attention is causal, but in a *physical* order: the window's known
tokens first, then its masked positions, each in the order of their *logical* positions, by which they are rotated. So a
known token sees all before the window and the known ones before it, and a masked position sees those, all known ones
and the masked ones before it.

Tokens at the window's front, before its first masked position, are final. In the next forward they come first in the
physical order, too, and so see what they would in an autoregressive model: their keys and values are kept, and nothing
has to be committed. The window then begins behind them, and has as many more masked positions at its end.

Other than as published: a token is final as soon as it is at the front, so that the forward that would only compute its
keys and values is not made at the end of an answer; tokens are filtered after the temperature, as in the other
decoders; and a window never reaches beyond `limit`, where the published code stops at the end of its pages. As
published, it does reach beyond `gen_length`, so that the tokens of an answer do not depend on how many are asked for.
Batch of one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_dllm.noise import stream_keys
from vllm_dllm.reference.edits import Known
from vllm_dllm.reference.layers import LayerKv
from vllm_dllm.reference.qwen import Qwen, block_causal
from vllm_dllm.reference.sampling import Sampling, choose_tokens, remove_tokens


@dataclass(frozen=True, slots=True)
class WindowRule:
    """Which masked positions of a window a step unmasks, in its engine's published values.

    Those whose entropy, of the model's distribution, is below the bound with the penalty; if none is, the lowest.
    """

    entropy_bound: float = 0.4  # nats; without a threshold, as published, is a bound that nothing is below
    position_penalty: float = 0.02  # nats for each position behind the window's first masked one

    def unmasks(self, logits: Tensor, positions: Tensor) -> Tensor:
        """Say which of the masked positions [num_masked] int64, ascending, are unmasked; logits: [num_masked, vocab].

        Returns: [num_masked] bool.
        """
        penalised = self.penalised(logits, positions)
        is_below: Tensor = penalised < self.entropy_bound
        is_lowest = torch.arange(len(positions)) == penalised.argmin()
        unmasked: Tensor = is_below if is_below.any() else is_lowest
        return unmasked

    def penalised(self, logits: Tensor, positions: Tensor) -> Tensor:
        """Return entropies with the penalty, [num_masked] float64; arguments as of `unmasks`."""
        entropy = torch.special.entr(logits.double().softmax(-1)).sum(-1)
        penalised: Tensor = entropy + self.position_penalty * (positions - positions[0])
        return penalised


_PUBLISHED, _GREEDY = WindowRule(), Sampling()


@dataclass(frozen=True, slots=True)
class Sliding:
    """What a call of `generate` did."""

    tokens: Tensor  # [gen_length] int64, fewer behind a stop token and at the limit
    steps: list[tuple[int, int]]  # of each: positions that it unmasked, tokens that became final

    @property
    def nfe(self) -> int:
        """Forwards that unmask something; the prompt's is not counted."""
        return len(self.steps)


@torch.no_grad()
def generate(
    model: Qwen,
    prompt: Tensor,
    *,
    gen_length: int,
    window: int = 16,
    rule: WindowRule = _PUBLISHED,
    sampling: Sampling = _GREEDY,
    stop_ids: tuple[int, ...] = (),
    limit: int | None = None,
) -> Sliding:
    """Generate tokens after a prompt [prompt_len] int64.

    Args:
        model, prompt: the model, and the tokens before the generation, at least one.
        gen_length: number of tokens.
        window: positions that are decided together.
        rule, sampling: which positions a step unmasks, how tokens are chosen; without guidance. The noise of a position
            is a function of the seed, the position and how many are masked in the window.
        stop_ids: the generation ends behind the first of these.
        limit: positions of prompt and generation, at most; None: any.
    """
    prompt_len = len(prompt)
    seq_len = prompt_len + gen_length + window if limit is None else limit
    last = min(prompt_len + gen_length, seq_len)
    tokens = torch.cat((prompt, prompt.new_full((seq_len - prompt_len,), model.config.mask_token_id)))
    is_masked = torch.arange(seq_len) >= prompt_len
    _, kv = model.forward(prompt, visible=block_causal(prompt_len, 1))
    stored = start = prompt_len
    steps: list[tuple[int, int]] = []
    while start < last:
        end = min(start + window, seq_len)
        logits, kv = predict(model, tokens[:end], is_masked[:end], (stored, start), kv)
        known = Known(tokens, is_masked, prompt_len)
        chosen, chosen_tokens = decide(known, Masked.of(known, logits, start, sampling), rule, sampling)
        tokens[chosen] = chosen_tokens
        is_masked[chosen] = False
        stored = start
        start += int((~is_masked[start:end]).long().cumprod(0).sum())
        steps.append((len(chosen), start - stored))
        answer = tokens[prompt_len : min(start, last)]
        stops = torch.isin(answer, torch.tensor(stop_ids, dtype=torch.int64)).nonzero()
        if len(stops):
            return Sliding(answer[: int(stops[0]) + 1], steps)
    return Sliding(tokens[prompt_len:last], steps)


def predict(
    model: Qwen, tokens: Tensor, is_masked: Tensor, begins: tuple[int, int], kv: list[LayerKv]
) -> tuple[Tensor, list[LayerKv]]:
    """Forward what is final and not stored, and the window.

    Args:
        model: the model.
        tokens, is_masked: [end], up to the window's end.
        begins: where what is not stored begins, and where the window does.
        kv: of what is stored.

    Returns: the logits of the window's positions, in their order, and the keys and values up to its begin.
    """
    stored, start = begins
    known, masked = ((is_masked[stored:] == value).nonzero().squeeze(-1) + stored for value in (False, True))
    order = torch.cat((known, masked))  # position of each row
    visible = block_causal(len(tokens), 1)[stored:]
    logits, updated = model.forward(tokens[order], stored, kv, visible=visible, positions=order)
    rows = torch.empty_like(logits).index_copy(0, order - stored, logits)[start - stored :]
    return rows, [(key[..., :start, :], value[..., :start, :]) for key, value in updated]


@dataclass(frozen=True, slots=True)
class Masked:
    """The masked positions of a window, as a step sees them."""

    positions: Tensor  # [num_masked] int64, ascending
    logits: Tensor  # [num_masked, vocab], as the request wants them

    @classmethod
    def of(cls, known: Known, logits: Tensor, start: int, sampling: Sampling) -> "Masked":
        """Take those of a window.

        Args:
            known: of the sequence.
            logits: [len, vocab], of the window's positions.
            start: the first of these.
            sampling: as of `generate`.
        """
        in_window = known.is_masked[start : start + len(logits)]
        rows = in_window.nonzero().squeeze(-1)
        edited = known.edited(logits, in_window, start, sampling.edits)[rows]
        return cls(start + rows, remove_tokens(edited, sampling.forbidden_ids))

    def tokens(self, sampling: Sampling, num_masked: int | None = None) -> Tensor:
        """Choose a token for each, [num_masked] int64, in a step that finds so many masked; None: in this one."""
        count = torch.full_like(self.positions, len(self.positions) if num_masked is None else num_masked)
        keys = stream_keys(torch.full_like(self.positions, sampling.seed), self.positions, count)
        return choose_tokens(self.logits, keys, sampling)


def decide(known: Known, masked: Masked, rule: WindowRule, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Choose the positions that a step unmasks, and their tokens; two [count] int64.

    Args:
        known: of the sequence.
        masked: of the window.
        rule, sampling: as of `generate`.
    """
    chosen = rule.unmasks(masked.logits, masked.positions)
    return known.goes(masked.positions[chosen], masked.tokens(sampling)[chosen], 0, sampling.edits)
