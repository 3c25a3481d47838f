"""What an implementation of attention is: what it supports, as data, and two calls.

`plan` is called once per forward, `run` of the plan once per layer. The cache of a layer is
`[num_pages, num_kv_heads, page_size, 2 * head_dim]` under any strides, keys before values.
"""

from collections.abc import Container
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from vllm_dllm.attention.layout import ForwardLayout


@dataclass(frozen=True, slots=True)
class Setting:
    """What decides which implementations can serve."""

    device_type: str  # "cpu" or "cuda"
    capability: tuple[int, int] | None  # of a CUDA device
    dtype: torch.dtype  # of the model
    kv_dtype: torch.dtype  # of the cache
    head_dim: int
    page_size: int | None  # positions per page; None: chosen later


@dataclass(frozen=True, slots=True)
class Support:
    """What an implementation declares to support."""

    device_types: Container[str]
    dtypes: Container[torch.dtype]
    head_dims: Container[int]
    page_sizes: Container[int]
    casts_cache: bool  # whether the cache may have another dtype than the model
    cuda_graphs: bool  # whether a captured forward may be replayed with other values in its layout
    least_capability: tuple[int, int] = (0, 0)

    def refusal(self, setting: Setting) -> str | None:
        """Return what of a setting is not supported, as a clause; None if all is."""
        capability = setting.capability or self.least_capability
        clauses = {
            f"it does not run on {setting.device_type}": setting.device_type in self.device_types,
            f"it needs a GPU of compute capability {self.least_capability[0]}.{self.least_capability[1]}, this one has "
            f"{capability[0]}.{capability[1]}": capability >= self.least_capability,
            f"it does not take {_name(setting.dtype)} (--dtype)": setting.dtype in self.dtypes,
            f"kv_cache_dtype {_name(setting.kv_dtype)} is not the model's {_name(setting.dtype)}": (
                self.casts_cache or setting.kv_dtype == setting.dtype
            ),
            f"it does not take heads of {setting.head_dim}": setting.head_dim in self.head_dims,
            f"it does not take pages of {setting.page_size} positions (--block-size)": (
                setting.page_size is None or setting.page_size in self.page_sizes
            ),
        }
        return next((clause for clause, is_supported in clauses.items() if not is_supported), None)


@dataclass(frozen=True, slots=True)
class Heads:
    """The attention of a model, alike in all its layers."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float  # factor of the scores
    dtype: torch.dtype


class Plan(Protocol):
    """The attention of one forward, ready for any layer."""

    def run(self, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, out: Tensor) -> None:
        """Attend from every row to its node's context, and to its node's rows or those of them up to it.

        Args:
            query: [num_rows, num_heads, head_dim].
            key, value: [num_rows, num_kv_heads, head_dim], of the same rows.
            kv_cache: [num_pages, num_kv_heads, page_size, 2 * head_dim], read where the layout says.
            out: [num_rows, num_heads, head_dim], written.
        """


class Attention(Protocol):
    """An implementation of attention, made once per engine for its heads and one layer's cache."""

    support: ClassVar[Support]

    @staticmethod
    def unavailable(setting: Setting) -> str | None:
        """Return why what the implementation needs is not installed, and the command that mends it; None if it is."""

    @staticmethod
    def temporary_bytes(query: Tensor, max_context_len: int) -> int:
        """Return how much memory a layer takes for a moment.

        Args:
            query: [num_rows, num_heads, head_dim], of as many rows as a forward may have.
            max_context_len: the most stored positions of a request.
        """

    def __init__(self, heads: Heads, kv_cache: Tensor) -> None: ...

    def plan(self, layout: ForwardLayout) -> Plan:
        """Prepare for a forward; nothing waits for the device."""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
