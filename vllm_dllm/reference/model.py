"""The LLaDA transformer in plain torch: the model half of the oracle.

LLaDA (arXiv:2502.09992, sec. 2.2 and app. A) is a Llama transformer whose attention sees the whole sequence. The
parameter names are those of the published checkpoints (`modeling_llada.py`, class `LLaDAModelLM`), so a checkpoint
loads without a name map. Shapes are named as in `reference.layers`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_dllm.reference.layers import (
    LayerKv,
    RMSNorm,
    attend,
    load_weights,
    merge_heads,
    rotate,
    split_heads,
)
from vllm_dllm.reference.rope import Rope, Rotation

_IMPLEMENTED: dict[str, object] = {
    "block_type": "llama",
    "layer_norm_type": "rms",
    "activation_type": "silu",
    "rope": True,
    "rope_full_precision": True,
    "alibi": False,
    "include_bias": False,
    "attention_layer_norm": False,
    "input_emb_norm": False,
    "scale_logits": False,
    "layer_norm_with_affine": True,
    "block_group_size": 1,
    "clip_qkv": None,
}
"""Fields of config.json that this model has one answer to; another value is refused."""


@dataclass(frozen=True, slots=True)
class LLaDAConfig:
    """The fields of a checkpoint's config.json that decide the computation, under their published names."""

    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    mlp_hidden_size: int
    vocab_size: int
    embedding_size: int  # rows of the embedding and columns of the logits, >= vocab_size
    mask_token_id: int
    eos_token_id: int
    max_sequence_length: int
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None  # or `rope_parameters`
    rms_norm_eps: float = 1e-5
    weight_tying: bool = False
    include_qkv_bias: bool = False

    @property
    def rope(self) -> Rope:
        """How positions are rotated."""
        return Rope.of(self.rope_theta, self.rope_scaling, self.max_sequence_length)

    @classmethod
    def from_json(cls, path: Path) -> "LLaDAConfig":
        """Read a checkpoint's config.json; raises ValueError where it asks for another computation."""
        values: dict[str, Any] = json.loads(path.read_text())
        for name, implemented in _IMPLEMENTED.items():
            given = values.get(name, implemented)
            if given != implemented:
                message = f"{name} is {given!r} in {path}; the reference model implements {implemented!r} alone."
                raise ValueError(message)
        if values.get("n_kv_heads") is None:
            values["n_kv_heads"] = values["n_heads"]
        if values.get("mlp_hidden_size") is None:
            values["mlp_hidden_size"] = values["d_model"] * values["mlp_ratio"]
        if values.get("embedding_size") is None:
            values["embedding_size"] = values["vocab_size"]
        values["rope_scaling"] = values.get("rope_parameters") or values.get("rope_scaling")
        return cls(**{field.name: values[field.name] for field in fields(cls) if field.name in values})


class Block(nn.Module):
    """One transformer layer (`LLaDALlamaBlock`; the published name, not a decoding block)."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        width, hidden = config.d_model, config.mlp_hidden_size
        self.head_dim = width // config.n_heads
        kv_width = self.head_dim * config.n_kv_heads
        self.attn_norm = RMSNorm(width, config.rms_norm_eps)
        self.q_proj = nn.Linear(width, width, bias=config.include_qkv_bias)
        self.k_proj = nn.Linear(width, kv_width, bias=config.include_qkv_bias)
        self.v_proj = nn.Linear(width, kv_width, bias=config.include_qkv_bias)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.ff_norm = RMSNorm(width, config.rms_norm_eps)
        self.ff_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.ff_out = nn.Linear(hidden, width, bias=False)

    def forward(
        self, x: Tensor, rotation: Rotation, start: int, kv: LayerKv | None, stays: Tensor | None
    ) -> tuple[Tensor, LayerKv]:
        """Map [*, len, d_model] to the same shape; see `LLaDA.forward` for the other arguments."""
        attended, kv = self._attend(self.attn_norm(x), rotation, start, kv, stays)
        x = x + attended
        narrow = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(narrow)) * self.up_proj(narrow)), kv

    def _attend(
        self, x: Tensor, rotation: Rotation, start: int, kv: LayerKv | None, stays: Tensor | None
    ) -> tuple[Tensor, LayerKv]:
        query = rotate(split_heads(self.q_proj(x), self.head_dim), rotation)
        key = rotate(split_heads(self.k_proj(x), self.head_dim), rotation)
        value = split_heads(self.v_proj(x), self.head_dim)
        attended, kv = attend(query, key, value, start, kv, stays=stays)
        output: Tensor = self.attn_out(merge_heads(attended))
        return output, kv


class Transformer(nn.Module):
    """The parameters under `model.transformer`."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.embedding_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.ln_f = RMSNorm(config.d_model, config.rms_norm_eps)
        if not config.weight_tying:
            self.ff_out = nn.Linear(config.d_model, config.embedding_size, bias=False)


class LLaDA(nn.Module):
    """The mask predictor: logits of every position of a sequence, given all of it."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict({"transformer": Transformer(config)})

    def forward(
        self, ids: Tensor, start: int = 0, kv: list[LayerKv] | None = None, *, stays: Tensor | None = None
    ) -> tuple[Tensor, list[LayerKv]]:
        """Predict the tokens at positions [start, start + len).

        Args:
            ids: [*, len] int64, the tokens at these positions.
            start: the position of the first of them; 0 without `kv`.
            kv: per layer, what an earlier forward returned. Keys and values of all other positions are read
                from it as they are; those of [start, start + len) are computed anew. A forward to the end of the
                sequence thus reads a prefix, a forward over one block reads both sides.
            stays: [len] bool, positions whose keys and values are read from `kv`, too: their rows say nothing; None:
                nobody's.

        Returns: logits [*, len, embedding_size], and per layer the keys and values of the sequence after it.
        """
        transformer = cast(Transformer, self.model["transformer"])
        positions = torch.arange(start, start + ids.shape[-1], device=ids.device)
        rotation = self.config.rope.rotation(positions, self.config.d_model // self.config.n_heads)
        x: Tensor = transformer.wte(ids)
        updated: list[LayerKv] = []
        for layer, block in enumerate(transformer.blocks):
            x, layer_kv = block(x, rotation, start, None if kv is None else kv[layer], stays)
            updated.append(layer_kv)
        head = transformer.wte if self.config.weight_tying else transformer.ff_out
        return F.linear(transformer.ln_f(x), head.weight), updated

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: torch.dtype) -> "LLaDA":
        """Load config.json and the safetensors files of a checkpoint folder, weights cast to `dtype`."""
        folder = Path(path)
        with torch.device("meta"):  # the weights are assigned below, so none are drawn here
            model = cls(LLaDAConfig.from_json(folder / "config.json"))
        load_weights(model, folder, dtype)
        return model.eval()
