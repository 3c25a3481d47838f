"""vLLM's attention backend interface around the implementations in `attention`."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionLayer,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)

from vllm_dllm.attention.choose import IMPLEMENTATIONS
from vllm_dllm.attention.interface import Attention, Heads, Plan
from vllm_dllm.attention.layout import PagedIndex
from vllm_dllm.attention.store import store_kv
from vllm_dllm.engine.config_hook import KV_CACHE_DTYPES
from vllm_dllm.engine.configs import settings_of
from vllm_dllm.errors import ConfigError

if TYPE_CHECKING:
    from vllm.config.cache import CacheDType


@dataclass(frozen=True, slots=True)
class ForwardAttention:
    """What the layers of a forward do: store their rows' K/V, then attend."""

    plan: Plan
    store: PagedIndex | None  # [num_rows]; None: nothing is stored


def implementation_of(vllm_config: VllmConfig) -> type[Attention]:
    """Return the implementation that `DllmConfigHook` chose."""
    name = settings_of(vllm_config).attention
    assert name != "auto", "the hook puts its choice in the place of auto"
    return IMPLEMENTATIONS[name]


class DllmMetadataBuilder(AttentionMetadataBuilder[ForwardAttention]):
    """Present because vLLM asks the backend for a builder; `DllmModelState` makes the metadata."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: Any) -> AttentionCGSupport:
        """Return whether the chosen implementation can be captured, in steps of any requests."""
        has_graphs = implementation_of(vllm_config).support.cuda_graphs
        return AttentionCGSupport.ALWAYS if has_graphs else AttentionCGSupport.NEVER

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> ForwardAttention:
        """Raise: a caller that reaches this does not know that the model has its own state."""
        raise RuntimeError("attention metadata of a diffusion model is made by DllmModelState.prepare_attn")


class DllmAttentionBackend(AttentionBackend):
    """Attention of a block to its request's paged context and to itself."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list["CacheDType"]] = list(KV_CACHE_DTYPES)
    # `forward` stores too: a denoising step stores nothing, and only its metadata knows.
    forward_includes_kv_cache_update: bool = True

    @staticmethod
    def get_name() -> str:
        """Return the name vLLM's enumeration has for backends of plugins."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type["DllmAttentionImpl"]:
        """Return the implementation."""
        return DllmAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[DllmMetadataBuilder]:
        """Return the metadata builder."""
        return DllmMetadataBuilder

    @classmethod
    def supports_non_causal(cls) -> bool:
        """Return True: nothing here is causal."""
        return True


class DllmAttentionImpl(AttentionImpl[ForwardAttention]):
    """One layer's attention, by the chosen implementation."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
    ) -> None:
        unsupported = {
            "alibi_slopes": alibi_slopes,
            "sliding_window": sliding_window,
            "logits_soft_cap": logits_soft_cap,
            "kv_sharing_target_layer_name": kv_sharing_target_layer_name,
        }
        for name, value in unsupported.items():
            if value:
                raise ConfigError(f"attention of a diffusion model got {name}={value!r}, allowed is None")
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = scale
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        vllm_config = get_current_vllm_config()
        self.implementation = implementation_of(vllm_config)
        self.max_context_len = vllm_config.model_config.max_model_len

    def heads(self, dtype: torch.dtype) -> Heads:
        """Return what an implementation is made for."""
        return Heads(self.num_heads, self.num_kv_heads, self.head_size, self.scale, dtype)

    def forward(
        self,
        layer: AttentionLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: ForwardAttention | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Store the rows' K/V if the forward does, and attend; the arguments are those of `Plan.run`.

        Without metadata, as in the profiling run before a cache exists, the output is zero, and as much memory is taken
        for a moment as a step may take.
        """
        if attn_metadata is None:
            num_bytes = self.implementation.temporary_bytes(query, self.max_context_len)
            query.new_empty(num_bytes, dtype=torch.int8)
            return output.zero_()
        if attn_metadata.store is not None:
            store_kv(key, value, kv_cache, attn_metadata.store)
        attn_metadata.plan.run(query, key, value, kv_cache, output)
        return output
