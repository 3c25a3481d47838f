"""Nemotron-Labs-Diffusion's two objectives at once: an autoregressive model, and one that denoises blocks.

A sequence is prompt ++ answer ++ EOS up to the sequence's end. Its clean rows are causal and predict the next token.
Blocks begin behind the prompt; the first position of each is known, each other one is masked with a probability t of
the block, uniform in (0, 1), and predicted from its block and from the clean rows before it, weighted by 1/t. One
forward does both, over the clean sequence and a masked copy of what holds some of the answer. The block length is drawn
for each batch, as self-speculation has windows of several. With `--adapter` the model stays as it is, and an adapter of
`o_proj` learns to write whole blocks from their first position: self-speculation's drafts.
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from data import BOS, EOS, MASK, mask_ratios
from torch import Tensor, nn
from torch.nn.utils import parametrize

from vllm_dllm.reference.nemotron import Nemotron
from vllm_dllm.reference.qwen import QwenConfig

MAX_LENGTH = 256
SEQUENCE_LENGTHS = {32: 6, 40: 5, 56: 4, 72: 2, 104: 1}  # length: weight
BLOCK_LENGTHS = (8, 16, 32, 32)
LAYERS = "layers"  # in the names of the layers' parameters
WRITERS = ("o_proj", "down_proj")  # matrices that write into the residual stream
LORA_RANK, LORA_ALPHA = 16, 64  # a scale of 4, as published with a rank of 128
ADAPTER_FOLDER = "linear_spec_lora"


def config_values(vocab_size: int) -> dict[str, object]:
    """Return config.json with the fields of the published checkpoints."""
    return {
        "architectures": ["NemotronLabsDiffusionModel"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "block_size": 32,
        "bos_token_id": BOS,
        "default_diffusion_steps": 32,
        "default_diffusion_threshold": 0.9,
        "default_generation_mode": "ar",
        "dlm_paradigm": "bidirectional",
        "eos_token_id": EOS,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 128,
        "initializer_range": 0.02,
        "intermediate_size": 384,
        "mask_token_id": MASK,
        "max_position_embeddings": 4 * MAX_LENGTH,
        "model_type": "nemotron_labs_diffusion",
        "num_attention_heads": 2,
        "num_hidden_layers": 6,
        "num_key_value_heads": 2,
        "pad_token_id": EOS,
        "rms_norm_eps": 1e-05,
        "rope_parameters": {
            "factor": 4.0,
            "llama_4_scaling_beta": 0.1,
            "max_position_embeddings": 4 * MAX_LENGTH,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": MAX_LENGTH,
            "rope_theta": 10000.0,
            "rope_type": "yarn",
        },
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": vocab_size,
    }


def make_model(config: Path) -> Nemotron:
    """Build the model that a config.json describes."""
    return Nemotron(QwenConfig.from_json(config))


def visible_in_training(length: int, first: int, block: Tensor, begin: Tensor) -> Tensor:
    """Return what each row of a clean sequence [0, length) ++ masked copy [first, length) sees.

    A row of the copy sees its own block of the copy and the clean rows before that; no clean row sees the copy.

    Args:
        length: of the clean sequence.
        first: position at which the copy begins.
        block: [batch, length - first], of each position of the copy.
        begin: as `block`, where that block begins.

    Returns: [batch, 1, rows, rows] bool.
    """
    batch, num_copied = block.shape
    causal = torch.ones(length, length).tril().bool().expand(batch, -1, -1)
    clean = torch.cat((causal, torch.zeros(batch, length, num_copied).bool()), dim=-1)
    copy = torch.cat((torch.arange(length) < begin[..., None], block[..., None] == block[:, None]), dim=-1)
    return torch.cat((clean, copy), dim=1)[:, None]


def both_logits(model: Nemotron, ids: Tensor, is_response: Tensor, ratio: float | None) -> tuple[Tensor, ...]:
    """Compute the logits of a batch, clean and masked.

    Args:
        model: the model.
        ids, is_response: [batch, length].
        ratio: of masked positions; None: drawn for each block.

    Returns: logits of the clean rows [batch, length, vocab_size] and of the copy [batch, num_copied, vocab_size], what
        the copy masks and with which probability, both [batch, num_copied].
    """
    batch, length = ids.shape
    block_length = BLOCK_LENGTHS[int(torch.randint(len(BLOCK_LENGTHS), ()))]
    prompt_len = is_response.long().argmax(1)[:, None]
    first = int(prompt_len.min())
    positions = torch.arange(first, length)
    block = torch.div(positions - prompt_len, block_length, rounding_mode="floor")
    begin = prompt_len + block * block_length
    num_blocks = int(block.max()) + 1
    drawn = mask_ratios(batch * num_blocks)[torch.randperm(batch * num_blocks)].view(batch, -1)
    ratios = drawn.gather(1, block.clamp(min=0)) if ratio is None else torch.full(block.shape, ratio)
    is_masked = (positions > begin) & (block >= 0) & (torch.rand(block.shape) < ratios)
    both = torch.cat((ids, ids[:, first:].masked_fill(is_masked, MASK)), dim=1)
    with torch.autocast("cpu", torch.bfloat16):
        logits, _ = model(
            both,
            visible=visible_in_training(length, first, block, begin),
            positions=torch.cat((torch.arange(length), positions)),
        )
    return logits[:, :length], logits[:, length:], is_masked, ratios


def masked_loss(model: Nemotron, ids: Tensor, is_response: Tensor) -> Tensor:
    """Add the cross-entropy of the next token and the bound of block diffusion, per response token."""
    clean, copy, is_masked, ratio = both_logits(model, ids, is_response, None)
    target = ids[:, -copy.shape[1] :]
    next_token = F.cross_entropy(clean[:, :-1][is_response[:, 1:]].float(), ids[:, 1:][is_response[:, 1:]])
    masked = F.cross_entropy(copy[is_masked].float(), target[is_masked], reduction="none")
    loss: Tensor = next_token + (masked / ratio[is_masked]).sum() / is_response.sum()
    return loss


class Adapted(nn.Module):
    """A weight and the adapter that is added to it."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        num_out, num_in = weight.shape
        self.a = nn.Parameter(torch.randn(LORA_RANK, num_in) / math.sqrt(num_in))  # PEFT's, but for its uniform draw
        self.b = nn.Parameter(torch.zeros(num_out, LORA_RANK))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the sum."""
        return weight + LORA_ALPHA / LORA_RANK * self.b @ self.a


def add_adapter(model: Nemotron) -> dict[str, nn.Parameter]:
    """Freeze a model and add an adapter to each `o_proj`; returns its parameters under their published names."""
    model.requires_grad_(requires_grad=False)
    parameters = {}
    for index, layer in enumerate(model.encoder.layers):
        projection = layer.self_attn.o_proj
        adapted = Adapted(projection.weight)
        parametrize.register_parametrization(projection, "weight", adapted)
        name = f"base_model.model.encoder.layers.{index}.self_attn.o_proj"
        parameters |= {f"{name}.lora_A.weight": adapted.a, f"{name}.lora_B.weight": adapted.b}
    return parameters


def write_adapter_config(checkpoint: Path) -> None:
    """Write what PEFT would beside an adapter."""
    folder = checkpoint / ADAPTER_FOLDER
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": LORA_RANK, "lora_alpha": LORA_ALPHA, "target_modules": ["o_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def adapter_loss(model: Nemotron, ids: Tensor, is_response: Tensor) -> Tensor:
    """Return the cross-entropy of blocks of which the first position alone is known."""
    _, copy, is_masked, _ = both_logits(model, ids, is_response, 1.0)
    return F.cross_entropy(copy[is_masked].float(), ids[:, -copy.shape[1] :][is_masked])
