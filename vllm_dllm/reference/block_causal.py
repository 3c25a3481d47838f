"""Block decoding of block-causal models, as published for SDAR (`block_diffusion_generate`, arXiv:2510.06303).

Blocks lie at multiples of their length, so that the first one may begin with the prompt's end, its *partial
block*. The keys and values of the prompt's whole blocks are stored once; a block is denoised under what is stored
before it, and is stored when it is finished. Batch of one.
"""

import torch
from torch import Tensor

from vllm_dllm.reference.decode import Generation
from vllm_dllm.reference.layers import LayerKv
from vllm_dllm.reference.policy import SDAR, Block, Rules, UnmaskPolicy, unmask
from vllm_dllm.reference.qwen import Qwen, block_causal
from vllm_dllm.reference.sampling import Sampling

_STATIC, _GREEDY = UnmaskPolicy(), Sampling()


def decoded_region(prompt_len: int, gen_length: int, block_length: int) -> tuple[int, int]:
    """Return the positions [first, last) of the blocks that a generation decodes, a partial block included."""
    first = prompt_len // block_length * block_length
    return first, -(-(prompt_len + gen_length) // block_length) * block_length


def store_prompt(model: Qwen, prompt: Tensor, block_length: int) -> list[LayerKv] | None:
    """Compute the keys and values of a prompt's whole blocks, per layer; None where it has none."""
    num_stored = len(prompt) // block_length * block_length
    if num_stored == 0:
        return None
    return model.forward(prompt[:num_stored], visible=block_causal(num_stored, block_length))[1]


@torch.no_grad()
def generate(
    model: Qwen,
    prompt: Tensor,
    *,
    gen_length: int,
    block_length: int,
    policy: UnmaskPolicy = _STATIC,
    sampling: Sampling = _GREEDY,
    stop_ids: tuple[int, ...] = (),
    rules: Rules = SDAR,
) -> Generation:
    """Generate at least `gen_length` tokens after a prompt [prompt_len] int64, up to the end of a block.

    Other than as published, the last block is not stored, and no more positions are unmasked than are masked: where
    the partial block leaves fewer than the schedule gives, the published code overwrites the prompt. Prompt positions
    are never masked, whatever their ids.

    Args:
        model: the model.
        prompt: the tokens before the generation.
        gen_length: least number of tokens.
        block_length: positions per block.
        policy: the unmasking policy; its `steps` are of each block.
        sampling: how tokens are chosen; without guidance.
        stop_ids: a block that generated one of these is the last.
        rules: the family's.

    Returns: the tokens and the history to the last block's end. `nfe` counts forwards that unmask something; the
        prompt's is in no count.
    """
    prompt_len = len(prompt)
    first_begin, seq_len = decoded_region(prompt_len, gen_length, block_length)
    tokens = torch.cat((prompt, prompt.new_full((seq_len - prompt_len,), model.config.mask_token_id)))
    is_masked = torch.arange(seq_len, device=prompt.device) >= prompt_len
    kv = store_prompt(model, prompt, block_length)
    steps = policy.steps or block_length
    nfe_commit = end = 0
    history: list[Tensor] = []
    for begin in range(first_begin, seq_len, block_length):
        if begin > first_begin:
            kv = model.forward(tokens[begin - block_length : begin], begin - block_length, kv)[1]
            nfe_commit += 1
        end = begin + block_length
        num_masked = int(is_masked[begin:end].sum())
        block = Block(begin, block_length, num_masked, steps, policy, sampling, rules, model.config.eos_token_id)
        while is_masked[begin:end].any():
            logits, _ = model.forward(tokens[begin:end], begin, kv)
            chosen, chosen_tokens = unmask(logits, is_masked[begin:end], first=begin, block=block)
            tokens[begin + chosen] = chosen_tokens
            is_masked[begin + chosen] = False
            history.append(tokens[prompt_len:].clone())
        if torch.isin(tokens[prompt_len:end], torch.tensor(stop_ids, dtype=torch.int64)).any():
            break
    return Generation(tokens[prompt_len:end], len(history), 0, torch.stack(history)[:, : end - prompt_len], nfe_commit)
