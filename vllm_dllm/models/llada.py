"""LLaDA for vLLM: Llama's layers with LLaDA's names, seen in both directions.

Covers LLaDA-8B-Base, LLaDA-8B-Instruct and LLaDA-1.5 (arXiv:2502.09992, 2505.19223). Module names follow the
checkpoint, so that quantisation configs find the layers they name.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix

from vllm_dllm.engine.attention import DllmAttentionBackend

if TYPE_CHECKING:
    from vllm_dllm.engine.model_state import DllmModelState


class LLaDAAttention(nn.Module):
    """Multi-head attention with rotary positions."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        tp_size = get_tensor_model_parallel_world_size()
        head_dim = config.d_model // config.n_heads
        self.qkv_proj = QKVParallelLinear(
            config.d_model,
            head_dim,
            config.n_heads,
            config.n_kv_heads,
            bias=False,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.attn_out = RowParallelLinear(
            config.d_model,
            config.d_model,
            bias=False,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.attn_out",
        )
        self.rotary_emb = get_rope(
            head_dim,
            max_position=config.max_sequence_length,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        )
        num_heads = config.n_heads // tp_size
        num_kv_heads = max(1, config.n_kv_heads // tp_size)
        self.split_sizes = [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim]
        self.attn = Attention(
            num_heads,
            head_dim,
            head_dim**-0.5,
            num_kv_heads=num_kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.attn",
            attn_backend=DllmAttentionBackend,
        )

    def forward(self, positions: Tensor, hidden: Tensor) -> Tensor:
        """Map [num_rows, d_model] to the same shape; positions: [num_rows] int64."""
        qkv, _ = self.qkv_proj(hidden)
        query, key, value = qkv.split(self.split_sizes, dim=-1)
        query, key = self.rotary_emb(positions, query, key)
        out: Tensor = self.attn_out(self.attn(query, key, value))[0]
        return out


class LLaDABlock(nn.Module):
    """One transformer layer, with the checkpoint's flat names."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.attn_norm = RMSNorm(config.d_model, eps=config.rms_norm_eps)
        self.attention = LLaDAAttention(vllm_config, prefix)
        self.ff_norm = RMSNorm(config.d_model, eps=config.rms_norm_eps)
        self.gate_up_proj = MergedColumnParallelLinear(
            config.d_model,
            [config.mlp_hidden_size] * 2,
            bias=False,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.gate_up_proj",
        )
        self.act = SiluAndMul()
        self.ff_out = RowParallelLinear(
            config.mlp_hidden_size,
            config.d_model,
            bias=False,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.ff_out",
        )

    def forward(self, positions: Tensor, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Apply the layer; hidden and residual are [num_rows, d_model], the residual not yet added."""
        if residual is None:
            residual = hidden
            hidden = self.attn_norm(hidden)
        else:
            hidden, residual = self.attn_norm(hidden, residual)
        hidden = self.attention(positions, hidden)
        hidden, residual = self.ff_norm(hidden, residual)
        hidden, _ = self.gate_up_proj(hidden)
        hidden, _ = self.ff_out(self.act(hidden))
        return hidden, residual


class LLaDATransformer(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.wte = VocabParallelEmbedding(config.vocab_size, config.d_model, quant_config=vllm_config.quant_config)
        self.blocks = nn.ModuleList(LLaDABlock(vllm_config, f"{prefix}.blocks.{i}") for i in range(config.n_layers))
        self.ln_f = RMSNorm(config.d_model, eps=config.rms_norm_eps)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Return [num_rows, d_model] for [num_rows] ids and positions."""
        hidden, residual = self.wte(input_ids), None
        for block in self.blocks:
            hidden, residual = block(positions, hidden, residual)
        out: Tensor = self.ln_f(hidden, residual)[0]
        return out


class LLaDAModelLM(nn.Module):
    """The model vLLM serves."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={"model.transformer.ff_out.": "lm_head.", "model.transformer.": "transformer."},
        orig_to_new_substr={".attn_out.": ".attention.attn_out."},
        orig_to_new_stacked={
            ".q_proj": (".attention.qkv_proj", "q"),
            ".k_proj": (".attention.qkv_proj", "k"),
            ".v_proj": (".attention.qkv_proj", "v"),
            ".ff_proj": (".gate_up_proj", 0),
            ".up_proj": (".gate_up_proj", 1),
        },
    )
    packed_modules_mapping = {  # noqa: RUF012 - the name and type vLLM's quantisation looks for
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["ff_proj", "up_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.transformer = LLaDATransformer(vllm_config, maybe_prefix(prefix, "model.transformer"))
        self.lm_head = ParallelLMHead(
            config.vocab_size,
            config.d_model,
            quant_config=vllm_config.quant_config,
            prefix=maybe_prefix(prefix, "model.transformer.ff_out"),
        )
        if config.weight_tying:
            self.lm_head = self.lm_head.tie_weights(self.transformer.wte)
        self.logits_processor = LogitsProcessor(config.vocab_size)

    @staticmethod
    def get_model_state_cls() -> "type[DllmModelState]":
        """Name the class that drives the denoising; vLLM's runner asks for it."""
        from vllm_dllm.engine.model_state import DllmModelState

        return DllmModelState

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Embed [num_rows] ids."""
        embedded: Tensor = self.transformer.wte(input_ids)
        return embedded

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: None = None,
    ) -> Tensor:
        """Return hidden rows [num_rows, d_model] for [num_rows] ids and positions.

        The two last arguments belong to vLLM's interface and stay None: pipeline parallelism and prompt embeddings
        are refused at start.
        """
        if input_ids.shape[0] == 0:  # a step of prefills only; zero-row kernels crash on some CPUs
            return self.transformer.ln_f.weight.new_empty(0, self.transformer.ln_f.weight.shape[0])
        return self.transformer(input_ids, positions)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Hand the hidden rows on: the sampler reduces them, with the head's weight or with `head_logits`."""
        return hidden

    def head_logits(self, hidden: Tensor) -> Tensor:
        """Return logits [num_rows, vocab_size] of hidden rows [num_rows, d_model], whole on every rank."""
        logits: Tensor = self.logits_processor(self.lm_head, hidden)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a checkpoint's tensors; returns the names of the parameters they filled."""
        loader = AutoWeightsLoader(self)
        return set(loader.load_weights(weights, mapper=self.hf_to_vllm_mapper))
