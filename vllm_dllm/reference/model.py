"""The LLaDA transformer in plain torch: the model half of the oracle.

LLaDA (arXiv:2502.09992, sec. 2.2 and app. A) is a Llama transformer whose attention sees the whole sequence. The
parameter names are those of the published checkpoints (`modeling_llada.py`, class `LLaDAModelLM`), so a checkpoint
loads without a name map.

Shapes: `*` any leading dimensions (none when decoding, a batch when training), `len` positions of this forward,
`seq_len` positions of the sequence, `heads` query heads, `kv_heads` key heads, `dim` the size of a head.
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

LayerKv = tuple[Tensor, Tensor]
"""Keys (rotated) and values of one layer: two [*, kv_heads, seq_len, dim]."""

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
    rms_norm_eps: float = 1e-5
    weight_tying: bool = False
    include_qkv_bias: bool = False

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
        return cls(**{field.name: values[field.name] for field in fields(cls) if field.name in values})


class RMSNorm(nn.Module):
    """Normalise in float32, round to the input's type, then scale."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """Map [*, size] to the same shape."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def rotary_angles(positions: Tensor, dim: int, theta: float) -> Tensor:
    """Return the rotation angles of the given positions [len]: [len, dim] float32, the second half as the first."""
    frequencies = theta ** (-torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim)
    return torch.outer(positions.float(), frequencies).repeat(1, 2)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate the pairs (i, i + dim/2) of [*, heads, len, dim] by angles [len, dim], in float32."""
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (wide * angles.cos() + turned * angles.sin()).to(x.dtype)


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

    def forward(self, x: Tensor, angles: Tensor, start: int, kv: LayerKv | None) -> tuple[Tensor, LayerKv]:
        """Map [*, len, d_model] to the same shape; see `LLaDA.forward` for `start` and `kv`."""
        attended, kv = self._attend(self.attn_norm(x), angles, start, kv)
        x = x + attended
        narrow = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(narrow)) * self.up_proj(narrow)), kv

    def _attend(self, x: Tensor, angles: Tensor, start: int, kv: LayerKv | None) -> tuple[Tensor, LayerKv]:
        query = rotate(self._heads(self.q_proj(x)), angles)
        key = rotate(self._heads(self.k_proj(x)), angles)
        value = self._heads(self.v_proj(x))
        if kv is not None:
            end = start + x.shape[-2]
            key, value = (
                torch.cat((old[..., :start, :], new, old[..., end:, :]), dim=-2)
                for old, new in zip(kv, (key, value), strict=True)
            )
        # No mask: each position sees the whole sequence.
        attended = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        output: Tensor = self.attn_out(attended.transpose(-2, -3).flatten(-2))
        return output, (key, value)

    def _heads(self, x: Tensor) -> Tensor:
        """Split [*, len, heads * dim] into [*, heads, len, dim]."""
        return x.view(*x.shape[:-1], -1, self.head_dim).transpose(-2, -3)


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

    def forward(self, ids: Tensor, start: int = 0, kv: list[LayerKv] | None = None) -> tuple[Tensor, list[LayerKv]]:
        """Predict the tokens at positions [start, start + len).

        Args:
            ids: [*, len] int64, the tokens at these positions.
            start: the position of the first of them; 0 without `kv`.
            kv: per layer, what an earlier forward returned. Keys and values of all other positions are read
                from it as they are; those of [start, start + len) are computed anew. A forward to the end of the
                sequence thus reads a prefix, a forward over one block reads both sides.

        Returns: logits [*, len, embedding_size], and per layer the keys and values of the sequence after it.
        """
        transformer = cast(Transformer, self.model["transformer"])
        positions = torch.arange(start, start + ids.shape[-1], device=ids.device)
        angles = rotary_angles(positions, self.config.d_model // self.config.n_heads, self.config.rope_theta)
        x: Tensor = transformer.wte(ids)
        updated: list[LayerKv] = []
        for layer, block in enumerate(transformer.blocks):
            x, layer_kv = block(x, angles, start, None if kv is None else kv[layer])
            updated.append(layer_kv)
        head = transformer.wte if self.config.weight_tying else transformer.ff_out
        return F.linear(transformer.ln_f(x), head.weight), updated

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: torch.dtype) -> "LLaDA":
        """Load config.json and the safetensors files of a checkpoint folder, weights cast to `dtype`."""
        folder = Path(path)
        with torch.device("meta"):  # the weights are assigned below, so none are drawn here
            model = cls(LLaDAConfig.from_json(folder / "config.json"))
        weights: dict[str, Tensor] = {}
        for shard in sorted(folder.glob("*.safetensors")):
            weights |= {name: tensor.to(dtype) for name, tensor in load_file(shard).items()}
        model.load_state_dict(weights, assign=True)
        return model.eval()
