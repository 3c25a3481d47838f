"""Nemotron-Labs-Diffusion's transformer in plain torch: Ministral's layers, under the names of its checkpoints.

Positions are YaRN's with an attention factor of 1. After the rotation a query is scaled by 1 + beta * ln(1 +
floor(position / original_max_position_embeddings)), which is 1 up to the original length. Text models alone. The
adapter in `linear_spec_lora` (LoRA, arXiv:2106.09685) belongs to the forwards that draft, see
`reference.self_speculation`.
"""

import copy
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vllm_dllm.reference.qwen import Decoder, Qwen, QwenConfig, Rotations


class Nemotron(Qwen):
    """The parameters of a checkpoint; what it computes is `Qwen.forward`."""

    def __init__(self, config: QwenConfig) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.encoder = Decoder(config)
        if not config.tie_word_embeddings:
            self.diffusion_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def parts(self) -> tuple[Decoder, nn.Embedding | nn.Linear]:
        """Return the layers, and the module whose weight is the LM head."""
        return self.encoder, self.encoder.embed_tokens if self.config.tie_word_embeddings else self.diffusion_head

    def rotations(self, positions: Tensor) -> Rotations:
        """Return how queries and keys at positions [len] are rotated, queries scaled."""
        cos, sin = super().rotations(positions)[1]
        turns = torch.floor(positions / self.config.rope.max_positions)
        scale = (1 + self.config.query_scale_beta * torch.log1p(turns))[:, None]
        return (cos * scale, sin * scale), (cos, sin)


def draft_model(model: Nemotron, checkpoint: Path) -> Nemotron:
    """Return the model that drafts: the same with the adapter of its checkpoint merged into it; itself without one.

    The adapter changes `o_proj` alone: its weight is W + lora_alpha / r * B A.
    """
    folder = checkpoint / "linear_spec_lora"
    if not folder.is_dir():
        return model
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    drafter = copy.deepcopy(model)
    for index in range(model.config.num_hidden_layers):
        name = f"encoder.layers.{index}.self_attn.o_proj"
        down, up = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        drafter.get_parameter(f"{name}.weight").data += config["lora_alpha"] / config["r"] * (up @ down)
    return drafter
