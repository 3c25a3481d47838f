"""The module that rotates queries and keys, as a configuration asks for it."""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.rotary_embedding import get_rope

from vllm_dllm.models.rope_fields import table_arguments


class ScaledQueries(nn.Module):
    """Rotary positions after which a query is scaled by 1 + beta * ln(1 + floor(position / original)), as Llama 4's.

    Args:
        rotary: rotates.
        beta: 0 scales nothing.
        original: positions of training.
    """

    def __init__(self, rotary: nn.Module, beta: float, original: int) -> None:
        super().__init__()
        self.rotary = rotary
        self.beta, self.original = beta, original

    def forward(self, positions: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate queries and keys [num_rows, num_heads * head_dim] at positions [num_rows], and scale the queries."""
        query, key = self.rotary(positions, query, key)
        scale = 1 + self.beta * torch.log1p(torch.floor(positions / self.original))
        return (query * scale[:, None]).to(query.dtype), key


def make_rotary(config: Any) -> nn.Module:
    """Return what rotates queries and keys of a configuration of ours."""
    max_position, rope = table_arguments(config.rope_parameters, config.max_position_embeddings)
    rotary: nn.Module = get_rope(config.head_dim, max_position, rope_parameters=rope)
    scaling = getattr(config, "llama_4_scaling", None)
    if scaling is None:
        return rotary
    return ScaledQueries(rotary, scaling["beta"], scaling["original_max_position_embeddings"])
