"""LLaDA2's transformer in plain torch (inclusionAI, `modeling_llada2_moe.py`), under its names.

Qwen3's layer with three differences: query, key and value are one matrix; only the first elements of a head are
rotated; and behind the first layers the feed-forward network is a mixture of experts in groups, beside experts that
every token has. A position sees what SDAR's sees. In LLaDA2.2 the tokens of a block choose experts together, in place
of groups; that is SGLang's statement of it.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from vllm_dllm.reference.layers import LayerKv, RMSNorm, attend, merge_heads, rotate, split_heads
from vllm_dllm.reference.qwen import MLP, Qwen, QwenConfig, Rotations
from vllm_dllm.reference.qwen import Decoder as QwenDecoder


@dataclass(frozen=True, slots=True)
class LLaDA2Config(QwenConfig):
    """Fields that other families do not have; absent ones are as in the published class."""

    rms_norm_eps: float = 1e-5
    num_shared_experts: int | None = 0
    moe_shared_expert_intermediate_size: int | None = None  # of a shared expert; None: as of the others
    first_k_dense_replace: int = 0  # layers without experts, at the start
    expert_capacity: int | None = None  # LLaDA2.2: experts that the tokens of a block of `block_size` choose among
    n_group: int = 8
    topk_group: int = 4
    routed_scaling_factor: float = 2.5
    partial_rotary_factor: float = 0.5

    @property
    def rotary_dim(self) -> int:
        """How many elements of a head are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)


class Attention(nn.Module):
    """The parameters under `attention`, and what they compute."""

    def __init__(self, config: LLaDA2Config) -> None:
        super().__init__()
        self.config = config
        self.heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        self.query_key_value = nn.Linear(config.hidden_size, sum(self.heads) * config.head_dim, bias=False)
        self.query_layernorm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.key_layernorm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.dense = nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=False)

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
        heads = split_heads(self.query_key_value(x), self.config.head_dim)  # [*, all heads, len, head_dim]
        query, key, value = heads.split(self.heads, dim=-3)
        query = self.rotate(self.query_layernorm(query), rotations)
        key = self.rotate(self.key_layernorm(key), rotations)
        attended, kv = attend(query, key, value, start, kv, visible, stays)
        return self.dense(merge_heads(attended)), kv

    def rotate(self, heads: Tensor, rotations: Rotations) -> Tensor:
        """Rotate the first elements of [*, heads, len, head_dim]."""
        first, rest = heads.tensor_split([self.config.rotary_dim], dim=-1)
        return torch.cat((rotate(first, rotations[0]), rest), dim=-1)


class Gate(nn.Module):
    """The parameters under `mlp.gate`, which choose each token's experts."""

    def __init__(self, config: LLaDA2Config) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.expert_bias = nn.Parameter(torch.zeros(config.num_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the experts of [num_tokens, hidden_size] and their weights, two [num_tokens, num_experts_per_tok].

        All in float32. The bias is of the choice alone. `torch.topk` decides between equals, as in the published code.
        """
        config = self.config
        scores = (x.float() @ self.weight.float().T).sigmoid()  # [num_tokens, num_experts]
        biased = scores + self.expert_bias.float()
        if config.expert_capacity is not None:
            parts = biased.split(config.block_size or len(biased))
            choosable = torch.cat([self.of_block(part, config.expert_capacity) for part in parts])
            chosen = choosable.sort(dim=-1, descending=True, stable=True).indices[:, : config.num_experts_per_tok]
        else:
            chosen = self.of_groups(biased).topk(config.num_experts_per_tok).indices
        weights = scores.gather(-1, chosen)
        if config.num_experts_per_tok > 1:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return chosen, weights * config.routed_scaling_factor

    def of_groups(self, biased: Tensor) -> Tensor:
        """Return scores [num_tokens, num_experts] with -inf in each token's groups that are not kept."""
        grouped = biased.unflatten(-1, (self.config.n_group, -1))
        of_group = grouped.topk(2).values.sum(-1)  # [num_tokens, n_group], of its two best
        kept = torch.zeros_like(of_group).scatter(-1, of_group.topk(self.config.topk_group).indices, 1.0).bool()
        choosable: Tensor = grouped.masked_fill(~kept[..., None], -torch.inf).flatten(-2)
        return choosable

    def of_block(self, biased: Tensor, capacity: int) -> Tensor:
        """Return scores [block_size, num_experts] with -inf for experts that the block does not keep.

        An expert scores as the token of the block that wants it most; the lower of equals is kept.
        """
        best = biased.amax(0).tolist()
        kept = sorted(range(len(best)), key=lambda expert: (-best[expert], expert))[:capacity]
        return torch.full_like(biased, -torch.inf).index_copy(1, torch.tensor(kept), biased[:, kept])


class Experts(nn.Module):
    """The parameters under `mlp` of a layer with experts, and what they compute."""

    def __init__(self, config: LLaDA2Config) -> None:
        super().__init__()
        self.gate = Gate(config)
        self.experts = nn.ModuleList(
            MLP(config.hidden_size, config.moe_intermediate_size) for _ in range(config.num_experts)
        )
        if config.num_shared_experts:
            inner = config.moe_shared_expert_intermediate_size or config.moe_intermediate_size
            self.shared_experts = MLP(config.hidden_size, inner * config.num_shared_experts)

    def forward(self, x: Tensor) -> Tensor:
        """Map [*, len, hidden_size] to the same shape."""
        rows = x.flatten(0, -2)
        chosen, weights = (torch.cat(each) for each in zip(*map(self.gate, rows.split(x.shape[-2])), strict=True))
        output = torch.zeros_like(rows, dtype=torch.float32)
        for number, expert in enumerate(self.experts):
            row, place = (chosen == number).nonzero(as_tuple=True)
            output[row] += weights[row, place][:, None] * expert(rows[row]).float()
        shared = self.shared_experts(rows) if hasattr(self, "shared_experts") else 0
        return (output.to(x.dtype) + shared).view_as(x)


class Layer(nn.Module):
    """One transformer layer."""

    def __init__(self, config: LLaDA2Config, layer: int) -> None:
        super().__init__()
        has_experts = layer >= config.first_k_dense_replace
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = Experts(config) if has_experts else MLP(config.hidden_size, config.intermediate_size)

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
        attended, kv = self.attention(self.input_layernorm(x), rotations, start, kv, visible, stays)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), kv


class Decoder(QwenDecoder):
    """The parameters under `model`."""

    def __init__(self, config: LLaDA2Config) -> None:
        nn.Module.__init__(self)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    @property
    def embed_tokens(self) -> nn.Embedding:  # type: ignore[override]  # nobody sets it
        """The embedding, by Qwen's name."""
        return self.word_embeddings


class LLaDA2(Qwen):
    """The parameters of a checkpoint; what it computes is `Qwen.forward`."""

    config: LLaDA2Config
    config_class: ClassVar[type[QwenConfig]] = LLaDA2Config
    decoder_class: ClassVar[type[QwenDecoder]] = Decoder

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
        """Forward as `Qwen.forward`. Raises: ValueError for rows that begin inside a block that routes together."""
        config = self.config
        if config.expert_capacity is not None and start % (config.block_size or 1):
            raise ValueError(f"start is {start}, inside a block of {config.block_size}; give a multiple")
        return super().forward(ids, start, kv, visible, positions, stays=stays)

    def rotations(self, positions: Tensor) -> Rotations:
        """Return how the first elements of queries and keys at positions [len] are rotated."""
        rotation = self.config.rope.rotation(positions, self.config.rotary_dim)
        return rotation, rotation
