"""Block diffusion, as SDAR is trained (arXiv:2510.06303; BD3-LM, arXiv:2503.09573, sec. 3.2 and app. B.6).

A sequence is prompt ++ answer ++ EOS up to the sequence's end, in blocks that begin at multiples of the block length.
Each block is masked with a probability t of its own, uniform in (0, 1), and predicted from itself and from the blocks
before it without masks; the cross-entropy of the masked tokens is weighted by 1/t. One forward does it for all blocks,
over the clean sequence and a masked copy of the blocks that hold some of the answer.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from data import BOS, EOS, MASK, mask_ratios
from torch import Tensor

from vllm_dllm.reference.qwen import Qwen, QwenConfig, block_causal

MAX_LENGTH = 256
SEQUENCE_LENGTHS = {32: 6, 40: 5, 56: 5}  # length: weight; multiples of the block length
BLOCK_LENGTH = 8
LAYERS = "layers"  # in the names of the layers' parameters
WRITERS = ("o_proj", "down_proj")  # matrices that write into the residual stream


def config_values(vocab_size: int) -> dict[str, object]:
    """Return config.json with the fields of the published SDAR checkpoints."""
    return {
        "architectures": ["SDARForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "block_size": BLOCK_LENGTH,
        "bos_token_id": BOS,
        "debug": False,
        "eos_token_id": EOS,
        "fuse_cross_entropy": False,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 128,
        "initializer_range": 0.02,
        "intermediate_size": 384,
        "mask_token_id": MASK,
        "max_position_embeddings": MAX_LENGTH,
        "max_window_layers": 6,
        "model_type": "sdar",
        "num_attention_heads": 2,
        "num_hidden_layers": 6,
        "num_key_value_heads": 2,
        "pad_token_id": EOS,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": vocab_size,
    }


def make_model(config: Path) -> Qwen:
    """Build the model that a config.json describes."""
    return Qwen(QwenConfig.from_json(config))


def visible_in_training(length: int, first: int) -> Tensor:
    """Return what each row of a clean sequence [0, length) ++ masked copy [first, length) sees, square, bool.

    A row of the copy sees its own block of the copy and the clean blocks before it; no clean row sees the copy.
    """
    block = torch.arange(length) // BLOCK_LENGTH
    copy = block[first:, None]
    clean_rows = torch.cat((block_causal(length, BLOCK_LENGTH), torch.zeros(length, length - first).bool()), dim=1)
    return torch.cat((clean_rows, torch.cat((copy > block, copy == block[first:]), dim=1)))


def masked_loss(model: Qwen, ids: Tensor, is_response: Tensor) -> Tensor:
    """Estimate the bound of block diffusion: cross-entropy over masked response tokens, weighted by 1/t."""
    batch, length = ids.shape
    first = int(is_response.long().argmax(1).min()) // BLOCK_LENGTH * BLOCK_LENGTH
    num_blocks = batch * (length - first) // BLOCK_LENGTH
    ratio = mask_ratios(num_blocks)[torch.randperm(num_blocks)].view(batch, -1).repeat_interleave(BLOCK_LENGTH, dim=1)
    target = ids[:, first:]
    is_masked = is_response[:, first:] & (torch.rand(target.shape) < ratio)
    positions = torch.cat((torch.arange(length), torch.arange(first, length)))
    with torch.autocast("cpu", torch.bfloat16):
        both = torch.cat((ids, target.masked_fill(is_masked, MASK)), dim=1)
        logits, _ = model(both, visible=visible_in_training(length, first), positions=positions)
    loss = F.cross_entropy(logits[:, length:][is_masked].float(), target[is_masked], reduction="none")
    weighted: Tensor = (loss / ratio[is_masked]).sum() / is_response.sum()
    return weighted
