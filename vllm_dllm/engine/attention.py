"""vLLM's attention backend interface around `attention.paged`."""

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionLayer,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)

from vllm_dllm.attention.layout import ForwardLayout
from vllm_dllm.attention.paged import CHUNK_BYTES, block_attention, store_kv
from vllm_dllm.engine.config_hook import KV_CACHE_DTYPES
from vllm_dllm.errors import ConfigError

if TYPE_CHECKING:
    from vllm.config.cache import CacheDType


class DllmMetadataBuilder(AttentionMetadataBuilder[ForwardLayout]):
    """Present because vLLM asks the backend for a builder; `DllmModelState` makes the metadata."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.ALWAYS

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> ForwardLayout:
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


class DllmAttentionImpl(AttentionImpl[ForwardLayout]):
    """One layer's attention, in plain torch."""

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

    def forward(
        self,
        layer: AttentionLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: ForwardLayout | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attend; the arguments are `attention.paged.block_attention`'s.

        Without metadata, as in the profiling run before a cache exists, the output is zero, and as much memory is taken
        for a moment as a step takes for gathered K/V and their concatenation.
        """
        if attn_metadata is None:
            query.new_empty(2 * CHUNK_BYTES, dtype=torch.int8)
            return output.zero_()
        if attn_metadata.store is not None:
            store_kv(key, value, kv_cache, attn_metadata.store)
        output.copy_(block_attention(query, key, value, kv_cache, attn_metadata, self.scale))
        return output
