"""Nemotron-Labs-Diffusion's linear self-speculation, as published: diffusion drafts, autoregression verifies.

A *window* begins with the last known token. One forward drafts the rest of it: every position sees all before the
window and all of the window, and takes its token, by the model with the checkpoint's own adapter. One more forward
verifies: causal, without the adapter, its keys and values kept. Row i of it says what follows position i; drafts are
accepted as long as they are that, and where the first is not, what it should have been is the *bonus token*, the next
window's first. So the tokens are those of `block_causal.generate_causally`, whatever was drafted. Batch of one.

At a temperature the noise of a position is the same in a draft, in its verification and in autoregression, a function
of the seed and the position (ours; the published decoder is greedy): the tokens are equal there, too.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_dllm.reference.block_causal import store, tokens_at
from vllm_dllm.reference.layers import LayerKv
from vllm_dllm.reference.qwen import Qwen
from vllm_dllm.reference.sampling import Sampling

MIN_WINDOW = 8

_GREEDY = Sampling()


@dataclass(frozen=True, slots=True)
class SelfSpeculation:
    """What a call of `generate` did."""

    tokens: Tensor  # [gen_length] int64, fewer behind a stop token
    windows: list[tuple[int, int]]  # of each that was drafted: its drafts, and how many were accepted
    num_verified: int  # forwards that verified, that of the prompt among them

    @property
    def nfe(self) -> int:
        """Forwards of the model."""
        return len(self.windows) + self.num_verified


def next_window(window: int, num_drafts: int, num_accepted: int, max_window: int) -> int:
    """Return the length of the next window: twice as long after all drafts were accepted, half after at most half."""
    if num_accepted == num_drafts:
        return min(2 * window, max_window)
    return max(window // 2, min(MIN_WINDOW, max_window)) if 2 * num_accepted <= num_drafts else window


@torch.no_grad()
def generate(
    model: Qwen,
    drafter: Qwen,
    prompt: Tensor,
    *,
    gen_length: int,
    max_window: int = 32,
    sampling: Sampling = _GREEDY,
    stop_ids: tuple[int, ...] = (),
) -> SelfSpeculation:
    """Generate tokens after a prompt [prompt_len] int64.

    A window never reaches beyond the end of the generation; one without drafts is verified at once.

    Args:
        model: verifies.
        drafter: the same with the adapter, see `nemotron.draft_model`.
        prompt: the tokens before the generation.
        gen_length: number of tokens.
        max_window: positions of a window, at most.
        sampling: how tokens are chosen; without guidance.
        stop_ids: the generation ends behind the first of these.
    """
    mask, end = model.config.mask_token_id, len(prompt) + gen_length
    window = min(MIN_WINDOW, max_window)
    logits, kv = store(model, prompt, 0, None, 1)
    known, num_verified = torch.cat((prompt, tokens_at(logits[-1:], len(prompt), sampling))), 1
    windows: list[tuple[int, int]] = []
    while len(known) < end and not _is_stop(known[len(prompt) :], stop_ids):
        begin = len(known) - 1
        drafts = known[:0]
        if (length := min(window, end - len(known))) > 1:
            masked = torch.cat((known[begin:], known.new_full((length - 1,), mask)))
            drafts = tokens_at(drafter.forward(masked, begin, kv)[0], begin, sampling)[1:]
        logits, kv = store(model, torch.cat((known, drafts)), begin, kv, 1)
        num_verified += 1
        follow = tokens_at(logits, begin + 1, sampling)
        num_accepted = int((follow[: len(drafts)] == drafts).long().cumprod(0).sum())
        known = torch.cat((known, follow[: num_accepted + 1]))
        kv = _kept(kv, begin + num_accepted + 1)
        if len(drafts):
            windows.append((len(drafts), num_accepted))
            window = next_window(window, len(drafts), num_accepted, max_window)
    tokens = known[len(prompt) :]
    stops = torch.isin(tokens, torch.tensor(stop_ids, dtype=torch.int64)).nonzero()
    return SelfSpeculation(tokens[: int(stops[0]) + 1] if len(stops) else tokens, windows, num_verified)


def _is_stop(tokens: Tensor, stop_ids: tuple[int, ...]) -> bool:
    return bool(torch.isin(tokens, torch.tensor(stop_ids, dtype=torch.int64)).any())


def _kept(kv: list[LayerKv], length: int) -> list[LayerKv]:
    """Return the keys and values of the first positions."""
    return [(key[..., :length, :], value[..., :length, :]) for key, value in kv]
