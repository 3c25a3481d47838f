"""Block decoding where keys and values never change: SDAR, Fast-dLLM v2 and Nemotron-Labs-Diffusion, as published.

    SDAR          `block_diffusion_generate`, arXiv:2510.06303: rules `SDAR`
    Fast-dLLM v2  `generation_functions.py`, arXiv:2509.26328: rules `FAST_DLLM`, without its cache inside a block
    Nemotron      the native decoder of nvidia/Nemotron-Labs-Diffusion: rules `NEMOTRON`, and `generate_causally`

A block is denoised under what is stored before it, and is stored when it is finished. Blocks of SDAR and Fast-dLLM v2
lie at multiples of their length, so that the first one may begin with the prompt's end, its *partial block*; stored
rows see their whole block. Nemotron's blocks begin behind the prompt, and the last one ends with the generation; stored
rows are causal. Where `unmasks_first_alone` is on, the last row that is stored before a block decides the block's first
position, unless the prompt has it. Batch of one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_dllm.noise import stream_keys
from vllm_dllm.reference.constraint import Constraint
from vllm_dllm.reference.decode import Generation, History, shift, take_step
from vllm_dllm.reference.ends import NO_ENDS, Ends
from vllm_dllm.reference.layers import LayerKv
from vllm_dllm.reference.policy import SDAR, Block, Rules, UnmaskPolicy
from vllm_dllm.reference.qwen import Qwen, block_causal
from vllm_dllm.reference.sampling import Sampling, choose_tokens
from vllm_dllm.reference.step import sequence_of, under

_STATIC, _GREEDY = UnmaskPolicy(), Sampling()


def decoded_region(prompt_len: int, gen_length: int, block_length: int, rules: Rules = SDAR) -> tuple[int, int]:
    """Return the positions [first, last) of the blocks that a generation decodes, a partial block included."""
    if rules.attention == "causal":
        return prompt_len, prompt_len + gen_length
    first = prompt_len // block_length * block_length
    return first, -(-(prompt_len + gen_length) // block_length) * block_length


def store(
    model: Qwen, tokens: Tensor, begin: int, kv: list[LayerKv] | None, block_length: int, rules: Rules = SDAR
) -> tuple[Tensor, list[LayerKv]]:
    """Store final tokens from a position on; returns their logits and all keys and values.

    Args:
        model: the model.
        tokens: all final tokens, [len] int64.
        begin: how many of them are stored.
        kv: their keys and values.
        block_length: positions per block.
        rules: of the family.
    """
    if rules.attention != "causal" and len(tokens) - begin <= block_length:  # a block sees all of itself
        return model.forward(tokens[begin:], begin, kv)
    visible = block_causal(len(tokens), 1 if rules.attention == "causal" else block_length)[begin:]
    return model.forward(tokens[begin:], begin, kv, visible=visible)


def store_prompt(model: Qwen, prompt: Tensor, block_length: int) -> list[LayerKv] | None:
    """Compute the keys and values of a prompt's whole blocks, per layer; None where it has none."""
    num_stored = len(prompt) // block_length * block_length
    return store(model, prompt[:num_stored], 0, None, block_length)[1] if num_stored else None


@torch.no_grad()
def generate(  # noqa: PLR0913 - the decoders' arguments
    model: Qwen,
    prompt: Tensor,
    *,
    gen_length: int,
    block_length: int,
    policy: UnmaskPolicy = _STATIC,
    sampling: Sampling = _GREEDY,
    rules: Rules = SDAR,
    constraint: Constraint | None = None,
    ends: Ends = NO_ENDS,
    given: Sequence[int | None] = (),
) -> Generation:
    """Generate at least `gen_length` tokens after a prompt [prompt_len] int64, up to the end of a block.

    Other than as published, the last block is not stored, and no more positions are unmasked than are masked: where
    a partial block leaves fewer than the schedule gives, the published code overwrites the prompt. Prompt positions
    are never masked, whatever their ids. A prompt of one whole block is stored before Fast-dLLM v2's next one, whose
    published code forgets it. Nemotron's last block, where it is shorter, takes the last steps of the schedule.

    Args:
        model, prompt: the model, and the tokens before the generation.
        gen_length, block_length: least number of tokens, of Nemotron exactly as many; positions per block.
        policy, sampling: its `steps` are of each block; how tokens are chosen, without guidance.
        rules, constraint, ends: of the family; what the answer has to meet; where it ends, behind which may be masks.
        given: of the answer, seen by its block.

    Returns: the tokens and the history to the last block's end; `nfe` counts all forwards that unmask something.
    """
    prompt_len = len(prompt)
    first_begin, seq_len = decoded_region(prompt_len, gen_length, block_length, rules)
    tokens, is_masked = sequence_of(prompt, seq_len, model.config.mask_token_id, given)
    kv: list[LayerKv] | None = None
    stored, steps = torch.empty(0), policy.steps or block_length
    num_stored = nfe_commit = end = 0
    history = History(prompt_len)
    for begin in range(first_begin, seq_len, block_length):
        if num_stored < begin:
            stored, kv = store(model, tokens[:begin], num_stored, kv, block_length, rules)
            nfe_commit, num_stored = nfe_commit + (begin > first_begin), begin
        end = min(begin + block_length, seq_len)
        num_masked = block_length - int((~is_masked[begin:end]).sum())
        block = Block(begin, block_length, num_masked, steps, policy, sampling, rules, model.config.eos_token_id)
        block = under(constraint, block, tokens, prompt_len, given)
        while is_masked[begin:end].any():
            if rules.unmasks_first_alone and is_masked[begin]:
                logits = stored[-1:].expand(end - begin, -1)
            else:
                logits, _ = model.forward(tokens[begin:end], begin, kv)
                logits = shift(logits, logits[:1]) if rules.logit_shift else logits
            take_step(tokens, is_masked, logits, begin, block, history)
            if ends.reached(tokens[prompt_len:end], is_masked[prompt_len:end]):
                break
        if ends.reached(tokens[prompt_len:end], is_masked[prompt_len:end]):
            break
    return history.generation(tokens[:end], nfe_commit=nfe_commit)


def tokens_at(logits: Tensor, first: int, sampling: Sampling) -> Tensor:
    """Choose the tokens of the positions from `first` on; logits: [len, vocab]. The noise is that of blocks of one."""
    positions = first + torch.arange(len(logits), device=logits.device)
    seeds, one = torch.full_like(positions, sampling.seed), torch.ones_like(positions)
    return choose_tokens(logits, stream_keys(seeds, positions, one), sampling)


@torch.no_grad()
def generate_causally(model: Qwen, prompt: Tensor, gen_length: int, sampling: Sampling = _GREEDY) -> Tensor:
    """Generate as an autoregressive model does, Nemotron's "ar" mode: the next token from the last row, each time.

    Returns: [gen_length] int64.
    """
    tokens, kv = prompt, None
    for _ in range(gen_length):
        logits, kv = store(model, tokens, 0 if kv is None else len(tokens) - 1, kv, 1)
        tokens = torch.cat((tokens, tokens_at(logits[-1:], len(tokens), sampling)))
    return tokens[len(prompt) :]
