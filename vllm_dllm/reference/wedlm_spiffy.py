"""Spiffy on top of `reference.wedlm`: guesses of a window's next states, evaluated in the forward that decides it.

A draft is a later state of the answer: more of its positions are known. What is known at the front of such a state is
final in it, so its window has slid, and it is evaluated as the decoder would evaluate it: behind what is stored, what
it knows, in the order of positions, then the masked positions of its own window. A *call* is one forward of an engine:
the present state and its drafts, none of which sees another, and of which nothing is stored.

The step's rule makes the next state from the present one's logits. If a draft is that state, it is *accepted*: its
logits are there, and the rule goes on from them. So tokens are those of the decoder, at every temperature.

Drafts are a chain. The masked positions that a step left are ordered by its entropies, with the penalty; draft k knows
the first k of them, each with the token that its step would choose from the same logits if it came alone. A step that
unmasks several at a time goes k drafts on at once. Positions that come into the window behind a step have no
logits, and are in no draft. Batch of one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_dllm.reference.edits import Known
from vllm_dllm.reference.layers import LayerKv
from vllm_dllm.reference.qwen import Qwen, block_causal
from vllm_dllm.reference.sampling import Sampling
from vllm_dllm.reference.wedlm import Masked, WindowRule, decide, predict

Key = tuple[tuple[int, ...], tuple[bool, ...]]

_PUBLISHED, _GREEDY = WindowRule(), Sampling()


@dataclass(slots=True)
class SpiffySliding:
    """What a call of `generate` did."""

    tokens: Tensor  # [gen_length] int64, fewer behind a stop token and at the limit
    steps: list[tuple[int, int]]  # of each transition: positions that it unmasked, tokens that became final
    nfe: int = 0  # calls; the prompt's is not counted
    num_proposed: int = 0  # drafts evaluated
    num_accepted: int = 0  # of them
    num_rows: int = 0  # of all calls, but for what they store


@dataclass(frozen=True, slots=True)
class _Decoder:
    """One request."""

    model: Qwen
    rule: WindowRule
    sampling: Sampling
    window: int
    last: int  # where the answer ends, whatever is in it
    stop_ids: tuple[int, ...]

    def start(self, known: Known) -> int:
        """Return where a state's window begins: at its first masked position."""
        masked = known.is_masked.nonzero()
        return int(masked[0]) if len(masked) else len(known.tokens)

    def end(self, known: Known) -> int:
        """Return where a state's window ends."""
        return min(self.start(known) + self.window, len(known.tokens))

    def length(self, known: Known) -> int | None:
        """Return how many tokens the answer has if it ends in a state; None where it goes on."""
        final = min(self.start(known), self.last)
        answer = known.tokens[known.prompt_len : final]
        stops = torch.isin(answer, torch.tensor(self.stop_ids, dtype=torch.int64)).nonzero()
        if len(stops):
            return int(stops[0]) + 1
        return len(answer) if final == self.last else None

    def evaluate(self, known: Known, stored: int, kv: list[LayerKv]) -> tuple[Tensor, list[LayerKv]]:
        """Forward a state behind what is stored; returns as of `predict`."""
        end = self.end(known)
        return predict(self.model, known.tokens[:end], known.is_masked[:end], (stored, self.start(known)), kv)

    def masked(self, known: Known, logits: Tensor) -> Masked:
        """Return the masked positions of a state's window; logits [len, vocab] are those of the window."""
        return Masked.of(known, logits, self.start(known), self.sampling)

    def drafts(self, root: Known, before: Masked, num_drafts: int) -> list[Known]:
        """Guess states that follow the root, from the masked positions that the step which led to it found."""
        order = self.rule.penalised(before.logits, before.positions).argsort(stable=True)
        order = order[root.is_masked[before.positions[order]]][:num_drafts]
        drafts, state = [], root
        for place in order.tolist():
            num_masked = int(state.is_masked[self.start(state) : self.end(state)].sum())
            token = before.tokens(self.sampling, num_masked)[place]
            state = _with(state, before.positions[place], token)
            drafts.append(state)
        return drafts

    def walk(self, root: Known, evaluated: dict[Key, Tensor], steps: list[tuple[int, int]]) -> tuple[Known, Masked]:
        """Take the steps whose logits a call computed.

        Args:
            root: the state that the call decides.
            evaluated: logits of the windows of the call's states.
            steps: gets what each step did.

        Returns: the state behind them, and the masked positions that the last one found.
        """
        state = root
        while True:
            before = self.masked(state, evaluated[_key(state)])
            after = _with(state, *decide(state, before, self.rule, self.sampling))
            unmasked = int(state.is_masked.sum() - after.is_masked.sum())
            steps.append((unmasked, self.start(after) - self.start(state)))
            state = after
            if _key(state) not in evaluated or self.length(state) is not None:
                return state, before


@torch.no_grad()
def generate(  # noqa: PLR0913 - the decoder's arguments, and how many drafts
    model: Qwen,
    prompt: Tensor,
    *,
    num_drafts: int,
    gen_length: int,
    window: int = 16,
    rule: WindowRule = _PUBLISHED,
    sampling: Sampling = _GREEDY,
    stop_ids: tuple[int, ...] = (),
    limit: int | None = None,
) -> SpiffySliding:
    """Generate what `wedlm.generate` does, in fewer calls.

    Args:
        num_drafts: most drafts of a call; with 0 it is the decoder itself.
        model, prompt, gen_length, window, rule, sampling, stop_ids, limit: as the decoder's.
    """
    prompt_len = len(prompt)
    seq_len = prompt_len + gen_length + window if limit is None else limit
    decoder = _Decoder(model, rule, sampling, window, min(prompt_len + gen_length, seq_len), stop_ids)
    tokens = torch.cat((prompt, prompt.new_full((seq_len - prompt_len,), model.config.mask_token_id)))
    state = Known(tokens, torch.arange(seq_len) >= prompt_len, prompt_len)
    stored, kv = prompt_len, model.forward(prompt, visible=block_causal(prompt_len, 1))[1]
    before: Masked | None = None
    made = SpiffySliding(prompt[:0], [])
    while (num := decoder.length(state)) is None:
        drafts = [] if before is None else decoder.drafts(state, before, num_drafts)
        start = decoder.start(state)
        logits, root_kv = decoder.evaluate(state, stored, kv)
        evaluated = {_key(draft): decoder.evaluate(draft, stored, kv)[0] for draft in drafts} | {_key(state): logits}
        made.nfe += 1
        made.num_proposed += len(drafts)
        made.num_rows += sum(decoder.end(each) - start for each in [state, *drafts])
        state, before = decoder.walk(state, evaluated, made.steps)
        stored, kv = start, root_kv
    made.tokens, made.num_accepted = state.tokens[prompt_len : prompt_len + num], len(made.steps) - made.nfe
    return made


def _with(known: Known, positions: Tensor, tokens: Tensor) -> Known:
    """Return a state in which these positions are known, too."""
    new, is_masked = known.tokens.clone(), known.is_masked.clone()
    new[positions] = tokens
    is_masked[positions] = False
    return Known(new, is_masked, known.prompt_len)


def _key(known: Known) -> Key:
    return tuple(known.tokens.tolist()), tuple(known.is_masked.tolist())
