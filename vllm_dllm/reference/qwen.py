"""The transformers of Llama's and Qwen's kind in plain torch: the model half of the oracle of Dream, SDAR and others.

Dream (arXiv:2508.15487) is Qwen2 without a causal mask: biases on query, key and value. SDAR (arXiv:2510.06303), and
TraDo with it, is Qwen3: no biases, query and key normalised per head before they are rotated; a position sees its
block and the blocks before it. Stable-DiffCoder (arXiv:2601.15892) is Llama, with neither biases nor norms, and sees
what SDAR sees. LLaDA-MoE and SDAR-MoE are Qwen3's layers with experts: of OLMoE, which does not renormalise the weights
of a token's experts, and of Qwen3-MoE, which does. The parameter names are the published ones, so a checkpoint loads
without a name map. Fast-dLLM v2 (arXiv:2509.26328) is Qwen2 and sees what SDAR sees; Nemotron, in
`reference.nemotron`, has Llama's layers under other names; LLaDA2, in `reference.llada2`, has layers of its own. WeDLM
(arXiv:2512.22737) is Qwen3 or Qwen2, and causal in another order than that of positions, see `reference.wedlm`. Shapes
are named as in `reference.layers`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

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

Rotations = tuple[Rotation, Rotation]
"""Of queries and of keys."""

_IMPLEMENTED: dict[str, object] = {
    "hidden_act": "silu",
    "use_sliding_window": False,
    "attention_bias": False,  # SDAR's; others have their biases whatever this says, but WeDLM
}
"""Fields of config.json that this model has one answer to; another value is refused."""


@dataclass(frozen=True, slots=True)
class Layers:
    """Where the layers of the architectures differ."""

    qkv_bias: bool = False
    qk_norm: bool = False  # of query and key, per head, before they are rotated


LAYERS = {
    "DreamModel": Layers(qkv_bias=True),
    "SDARForCausalLM": Layers(qk_norm=True),
    "Fast_dLLM_QwenForCausalLM": Layers(qkv_bias=True),
    "NemotronLabsDiffusionModel": Layers(),
    "SeedDiffcoderForCausalLM": Layers(),
    "LLaDAMoEModelLM": Layers(qk_norm=True),
    "SDARMoeForCausalLM": Layers(qk_norm=True),
    "LLaDA2MoeModelLM": Layers(qk_norm=True),  # in `reference.llada2`
    "WeDLMForCausalLM": Layers(qk_norm=True),  # Qwen2's with `attention_bias`
}
"""By architecture."""


@dataclass(frozen=True, slots=True)
class QwenConfig:
    """The fields of a checkpoint's config.json that decide the computation, under their published names."""

    architecture: str  # the entry of `architectures`
    hidden_size: int
    intermediate_size: int  # of a layer without experts
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    mask_token_id: int
    eos_token_id: int
    rope_theta: float
    max_position_embeddings: int
    rope_scaling: Mapping[str, Any] | None = None  # or `rope_parameters`
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    block_size: int | None = None  # SDAR, Nemotron and, as `bd_size`, Fast-dLLM v2: the block length of training
    query_scale_beta: float = 0.0  # Nemotron's `llama_4_scaling_beta`
    attention_bias: bool = False  # WeDLM: biases on query, key and value, and no norms
    num_experts: int = 0  # 0: the feed-forward network is one
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = True

    def __post_init__(self) -> None:
        """Raise ValueError for an architecture that this model is not."""
        if self.architecture not in LAYERS:
            message = f"architecture is {self.architecture!r}; the reference model is one of {', '.join(LAYERS)}"
            raise ValueError(message)

    @property
    def layers(self) -> Layers:
        """What the layers are."""
        has_biases = self.architecture == "WeDLMForCausalLM" and self.attention_bias
        return Layers(qkv_bias=True) if has_biases else LAYERS[self.architecture]

    @property
    def rope(self) -> Rope:
        """How positions are rotated."""
        return Rope.of(self.rope_theta, self.rope_scaling, self.max_position_embeddings)

    @classmethod
    def from_json(cls, path: Path) -> "QwenConfig":
        """Read a checkpoint's config.json; raises ValueError where it asks for another computation."""
        values: dict[str, Any] = json.loads(path.read_text())
        is_wedlm = values["architectures"] == ["WeDLMForCausalLM"]
        if is_wedlm:
            values.setdefault("attention_bias", True)
        for name, implemented in _IMPLEMENTED.items():
            given = values.get(name, implemented)
            if given != implemented and not (is_wedlm and name == "attention_bias"):
                message = f"{name} is {given!r} in {path}; the reference model implements {implemented!r} alone."
                raise ValueError(message)
        values["architecture"] = values["architectures"][0]
        if "SeedDiffcoderForCausalLM" in str(values.get("auto_map")):  # its `architectures` say it is a Llama
            values["architecture"] = "SeedDiffcoderForCausalLM"
        if values.get("num_key_value_heads") is None:
            values["num_key_value_heads"] = values["num_attention_heads"]
        if values.get("head_dim") is None:
            values["head_dim"] = values["hidden_size"] // values["num_attention_heads"]
        values["intermediate_size"] = values.get("intermediate_size") or 0
        if (
            values["architecture"] == "LLaDAMoEModelLM"
        ):  # the published code renormalises nothing, whatever is asked for
            values |= {"moe_intermediate_size": values["expert_intermediate_size"], "norm_topk_prob": False}
        values["rope_scaling"] = values.get("rope_parameters") or values.get("rope_scaling")
        values.setdefault("rope_theta", (values["rope_scaling"] or {}).get("rope_theta"))
        if values["architecture"] == "NemotronLabsDiffusionModel":
            values["rope_scaling"] = dict(values["rope_scaling"] or {})
            values["query_scale_beta"] = values["rope_scaling"].pop("llama_4_scaling_beta", 0.0)
            values["rope_scaling"].pop("max_position_embeddings", None)
        values.setdefault("block_size", values.get("bd_size"))
        return cls(**{field.name: values[field.name] for field in fields(cls) if field.name in values})


class Attention(nn.Module):
    """The parameters under `self_attn`, and what they compute."""

    def __init__(self, config: QwenConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        layers = config.layers
        width = config.hidden_size
        query_width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(width, query_width, bias=layers.qkv_bias)
        self.k_proj = nn.Linear(width, kv_width, bias=layers.qkv_bias)
        self.v_proj = nn.Linear(width, kv_width, bias=layers.qkv_bias)
        self.o_proj = nn.Linear(query_width, width, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if layers.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if layers.qk_norm else nn.Identity()

    def forward(
        self,
        x: Tensor,
        rotations: Rotations,
        start: int,
        kv: LayerKv | None,
        visible: Tensor | None,
        stays: Tensor | None,
    ) -> tuple[Tensor, LayerKv]:
        """Map [*, len, hidden_size] to the same shape; see `Qwen.forward` for the other arguments."""
        query = rotate(self.q_norm(split_heads(self.q_proj(x), self.head_dim)), rotations[0])
        key = rotate(self.k_norm(split_heads(self.k_proj(x), self.head_dim)), rotations[1])
        value = split_heads(self.v_proj(x), self.head_dim)
        attended, kv = attend(query, key, value, start, kv, visible, stays)
        return self.o_proj(merge_heads(attended)), kv


class MLP(nn.Module):
    """The parameters under `mlp` or those of an expert, and what they compute."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [*, hidden_size] to the same shape."""
        output: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return output


class Experts(nn.Module):
    """The parameters under `mlp` of a mixture of experts: each token is computed by the likeliest few for it."""

    def __init__(self, config: QwenConfig) -> None:
        super().__init__()
        self.config = config
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(
            MLP(config.hidden_size, config.moe_intermediate_size) for _ in range(config.num_experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map [*, hidden_size] to the same shape; the probabilities of experts are of float32."""
        probs = self.gate(x).float().softmax(-1)
        weights, chosen = probs.topk(self.config.num_experts_per_tok)  # [*, num_experts_per_tok]
        if self.config.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        shares = torch.zeros_like(probs).scatter(-1, chosen, weights).to(x.dtype)  # [*, num_experts]
        output = torch.zeros_like(x)
        for share, expert in zip(shares.unbind(-1), self.experts, strict=True):
            rows = share > 0
            output[rows] += share[rows][:, None] * expert(x[rows])
        return output


class Layer(nn.Module):
    """One transformer layer."""

    def __init__(self, config: QwenConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = Experts(config) if config.num_experts else MLP(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        x: Tensor,
        rotations: Rotations,
        start: int,
        kv: LayerKv | None,
        visible: Tensor | None,
        stays: Tensor | None,
    ) -> tuple[Tensor, LayerKv]:
        """Map [*, len, hidden_size] to the same shape; see `Qwen.forward` for the other arguments."""
        attended, kv = self.self_attn(self.input_layernorm(x), rotations, start, kv, visible, stays)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), kv


class Decoder(nn.Module):
    """The parameters under `model`."""

    def __init__(self, config: QwenConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Qwen(nn.Module):
    """The mask predictor: the logits of each row; under Dream's logit shift they are those of the next position."""

    config_class: ClassVar[type[QwenConfig]] = QwenConfig
    decoder_class: ClassVar[type[Decoder]] = Decoder

    def __init__(self, config: QwenConfig) -> None:
        super().__init__()
        self.config = config
        self.model = self.decoder_class(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self,
        ids: Tensor,
        start: int = 0,
        kv: list[LayerKv] | None = None,
        visible: Tensor | None = None,
        positions: Tensor | None = None,
        *,
        stays: Tensor | None = None,
    ) -> tuple[Tensor, list[LayerKv]]:
        """Forward the tokens at positions [start, start + len).

        Args:
            ids: [*, len] int64, the tokens at these positions.
            start: the position of the first of them; 0 without `kv`.
            kv: per layer, what an earlier forward returned: of the whole sequence, or of a prefix of at least `start`
                positions. Keys and values of all other positions are read from it as they are.
            visible: [len, seq_len] bool, which positions each one sees, `block_causal` for SDAR and its kin; None: all.
            positions: [len] int64, what the tokens are rotated by where a training sequence holds several versions
                of a position; None: from `start` on.
            stays: as of `LLaDA.forward`.

        Returns: logits [*, len, vocab_size], and per layer the keys and values of the sequence after it.
        """
        if positions is None:
            positions = torch.arange(start, start + ids.shape[-1], device=ids.device)
        decoder, head = self.parts()
        rotations = self.rotations(positions)
        x: Tensor = decoder.embed_tokens(ids)
        updated: list[LayerKv] = []
        for index, layer in enumerate(decoder.layers):
            x, layer_kv = layer(x, rotations, start, None if kv is None else kv[index], visible, stays)
            updated.append(layer_kv)
        return F.linear(decoder.norm(x), head.weight), updated

    def parts(self) -> tuple[Decoder, nn.Embedding | nn.Linear]:
        """Return the layers, and the module whose weight is the LM head."""
        return self.model, self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head

    def rotations(self, positions: Tensor) -> Rotations:
        """Return how queries and keys at positions [len] are rotated."""
        rotation = self.config.rope.rotation(positions, self.config.head_dim)
        return rotation, rotation

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: torch.dtype) -> "Qwen":
        """Load config.json and the safetensors files of a checkpoint folder, weights cast to `dtype`."""
        folder = Path(path)
        with torch.device("meta"):  # the weights are assigned below, so none are drawn here
            model = cls(cls.config_class.from_json(folder / "config.json"))
        load_weights(model, folder, dtype)
        return model.eval()


def block_causal(seq_len: int, block_length: int) -> Tensor:
    """Return which positions each one sees in SDAR: those of its block and of all before; [seq_len, seq_len] bool."""
    block = torch.arange(seq_len) // block_length
    return block[:, None] >= block
