"""The transformer that all families share: Llama's layers, with Qwen2's biases, Qwen3's norms or its experts.

What a layer needs to know it reads from the configuration, under Qwen's field names; `qkv_bias`, `qk_norm` and
`has_experts` are facts of the configuration's class. Modules have the names of Qwen's checkpoints, which most families
kept; one that names them otherwise maps its names to these, and vLLM maps those in quantisation configs alike.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.interfaces import SupportsLoRA
from vllm.model_executor.models.qwen3_moe import Qwen3MoeSparseMoeBlock
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix
from vllm.model_executor.parameter import BasevLLMParameter
from vllm.platforms import current_platform

from vllm_dllm.engine.attention import DllmAttentionBackend
from vllm_dllm.errors import ConfigError
from vllm_dllm.models.checkpoint_tensors import Shape, Sizes, TensorCount, embedding_name, head_name, needed_tensors
from vllm_dllm.models.grouped_experts import GroupedExperts
from vllm_dllm.models.rotary import make_rotary

if TYPE_CHECKING:
    from vllm_dllm.engine.model_state import DllmModelState


FILLED_BY_VLLM = ("g_idx",)
"""Parameters of quantised modules that a checkpoint may leave out: vLLM gives them the value of one that has none."""


class SelfAttention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config, quant_config = vllm_config.model_config.hf_config, vllm_config.quant_config
        tp_size = get_tensor_model_parallel_world_size()
        self.head_dim = head_dim = config.head_dim
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            head_dim,
            config.num_attention_heads,
            config.num_key_value_heads,
            bias=config.qkv_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * head_dim,
            config.hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        if config.qk_norm:
            self.q_norm = RMSNorm(head_dim, eps=config.rms_norm_eps)
            self.k_norm = RMSNorm(head_dim, eps=config.rms_norm_eps)
        self.has_norms = config.qk_norm
        self.rotary_emb = make_rotary(config)
        num_heads = config.num_attention_heads // tp_size
        num_kv_heads = max(1, config.num_key_value_heads // tp_size)  # ranks beyond their number share them
        self.split_sizes = [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim]
        self.attn = Attention(
            num_heads,
            head_dim,
            head_dim**-0.5,
            num_kv_heads=num_kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=quant_config,
            prefix=f"{prefix}.attn",
            attn_backend=DllmAttentionBackend,
        )

    def forward(self, positions: Tensor, hidden: Tensor) -> Tensor:
        """Map [num_rows, hidden_size] to the same shape; positions: [num_rows] int64."""
        qkv, _ = self.qkv_proj(hidden)
        query, key, value = qkv.split(self.split_sizes, dim=-1)
        if self.has_norms:
            query = self.q_norm(query.unflatten(-1, (-1, self.head_dim))).flatten(-2)
            key = self.k_norm(key.unflatten(-1, (-1, self.head_dim))).flatten(-2)
        query, key = self.rotary_emb(positions, query, key)
        out: Tensor = self.o_proj(self.attn(query, key, value))[0]
        return out


class FeedForward(nn.Module):
    """The gated feed-forward network."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config, quant_config = vllm_config.model_config.hf_config, vllm_config.quant_config
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size,
            [config.intermediate_size] * 2,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.gate_up_proj",
        )
        self.act = SiluAndMul()
        self.down_proj = RowParallelLinear(
            config.intermediate_size,
            config.hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.down_proj",
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """Map [num_rows, hidden_size] to the same shape."""
        gate_up, _ = self.gate_up_proj(hidden)
        out: Tensor = self.down_proj(self.act(gate_up))[0]
        return out


class Layer(nn.Module):
    """One transformer layer."""

    def __init__(self, vllm_config: VllmConfig, prefix: str, layer: int) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = SelfAttention(vllm_config, f"{prefix}.self_attn")
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        feed_forward: type[nn.Module] = FeedForward
        if config.has_experts and layer >= config.num_dense_layers:
            feed_forward = GroupedExperts if config.has_expert_bias else Qwen3MoeSparseMoeBlock
        self.mlp = feed_forward(vllm_config, f"{prefix}.mlp")

    def forward(self, positions: Tensor, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Apply the layer; hidden and residual are [num_rows, hidden_size], the residual not yet added."""
        if residual is None:
            residual = hidden
            hidden = self.input_layernorm(hidden)
        else:
            hidden, residual = self.input_layernorm(hidden, residual)
        hidden = self.self_attn(positions, hidden)
        hidden, residual = self.post_attention_layernorm(hidden, residual)
        return self.mlp(hidden), residual


class Transformer(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size,
            config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.embed_tokens",
        )
        self.layers = nn.ModuleList(
            Layer(vllm_config, f"{prefix}.layers.{i}", i) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Return [num_rows, hidden_size] for [num_rows] ids and positions."""
        hidden, residual = self.embed_tokens(input_ids), None
        for layer in self.layers:
            hidden, residual = layer(positions, hidden, residual)
        out: Tensor = self.norm(hidden, residual)[0]
        return out


class MaskedDiffusionLM(nn.Module, SupportsLoRA):
    """The model vLLM serves, for every family.

    Adapters (LoRA) change the layers' linear modules. The embedding and the LM head have none: `embedding_modules` is
    empty, since the sampler reads the head's weight itself.
    """

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={
            ".q_proj": (".qkv_proj", "q"),
            ".k_proj": (".qkv_proj", "k"),
            ".v_proj": (".qkv_proj", "v"),
            ".mlp.gate_proj": (".mlp.gate_up_proj", 0),  # those of experts go to their own loader
            ".mlp.up_proj": (".mlp.gate_up_proj", 1),
        },
    )
    packed_modules_mapping = {  # noqa: RUF012 - the name and type vLLM's quantisation and LoRA look for
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        if current_platform.is_cpu():
            from vllm_dllm.engine.cpu.primitive_cache import bound_primitive_cache

            bound_primitive_cache()
        self.config = config = vllm_config.model_config.hf_config
        self.quant_config = vllm_config.quant_config  # vLLM's loader asks it for the names of scales
        # Weights that replace others, as a trainer's do, come in parts; so do all that follow dummies.
        self.takes_part = vllm_config.load_config.load_format == "dummy"
        self.model = Transformer(vllm_config, maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            config.vocab_size,
            config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)

    @staticmethod
    def get_model_state_cls() -> "type[DllmModelState]":
        """Name the class that drives the denoising; vLLM's runner asks for it."""
        from vllm_dllm.engine.model_state import DllmModelState

        return DllmModelState

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Embed [num_rows] ids."""
        embedded: Tensor = self.model.embed_tokens(input_ids)
        return embedded

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: None = None,
    ) -> Tensor:
        """Return hidden rows [num_rows, hidden_size] for [num_rows] ids and positions.

        The two last arguments belong to vLLM's interface and stay None: pipeline parallelism and prompt embeddings
        are refused at start.
        """
        if input_ids.shape[0] == 0:  # a step of prefills only; zero-row kernels crash on some CPUs
            return self.model.norm.weight.new_empty(0, self.model.norm.weight.shape[0])
        return self.model(input_ids, positions)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Hand the hidden rows on: the sampler reduces them, with the LM head's weight or with `head_logits`."""
        return hidden

    def head_logits(self, hidden: Tensor) -> Tensor:
        """Return logits [num_rows, vocab_size] of hidden rows [num_rows, hidden_size], whole on every rank."""
        logits: Tensor = self.logits_processor(self.lm_head, hidden)
        return logits

    def own_logits(self, hidden: Tensor) -> Tensor:
        """Return logits of this rank's part of the vocabulary, and behind them those of the rows that pad it."""
        logits: Tensor = self.logits_processor(self.lm_head, hidden, skip_gather=True)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a checkpoint's tensors; returns the names of the parameters they filled.

        Raises: ConfigError for tensors that are missing, unknown, doubled or of another shape. Which names and shapes
            a quantisation method has, vLLM knows; its refusals name no tensor.
        """
        count = TensorCount(
            self._needed_tensors(),
            tied=(head_name(self.config), embedding_name(self.config)) if self.config.tie_word_embeddings else None,
            is_open=self.quant_config is not None,
            is_part=self.takes_part,
        )
        try:
            loaded = set(AutoWeightsLoader(self).load_weights(count.passing(weights), mapper=self.hf_to_vllm_mapper))
        except ConfigError:
            raise
        except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            asked, todo = "what its config.json asks for", "correct config.json"
            if self.quant_config is not None:  # of the checkpoint, or of a flag
                asked = f"what quantization {self.quant_config.get_name()!r} does with it here"
                todo = "correct quantization_config in config.json, or --quantization"
            raise ConfigError(
                f"the checkpoint's tensor {count.passed} does not fit {asked}: {error or type(error).__name__}; repair "
                f"the checkpoint's files or {todo}"
            ) from error
        self.takes_part = True
        return loaded

    def _needed_tensors(self) -> dict[str, Shape | Sizes]:
        """Return the tensors that fill this model: of a quantised module, one for each of its parameters."""
        needed: dict[str, Shape | Sizes] = {}
        for name, shape in needed_tensors(self.config).items():
            mapped = self.hf_to_vllm_mapper.map_name(name)
            if ".experts." in mapped:
                needed |= self._needed_of_experts(name, mapped, shape)
                continue
            module = self.get_submodule(mapped.rpartition(".")[0])
            method = getattr(module, "quant_method", None)
            if method is None or isinstance(method, UnquantizedLinearMethod | UnquantizedEmbeddingMethod):
                needed[name] = shape
                continue
            published = name.rpartition(".")[0]
            parameters = dict(module.named_parameters(recurse=False))
            needed |= {
                f"{published}.{leaf}": {0: shape[0]} if leaf == "bias" else _sizes(module, parameter, shape[0])
                for leaf, parameter in parameters.items()
                if leaf not in FILLED_BY_VLLM
            }
        return needed

    def _needed_of_experts(self, name: str, mapped: str, shape: Shape) -> dict[str, Shape | Sizes]:
        """Return what fills the place of an expert's weight: vLLM keeps those of a layer's experts together."""
        experts: Any = self.get_submodule(f"{mapped.partition('.experts.')[0]}.experts.routed_experts")
        if isinstance(experts.quant_method, UnquantizedFusedMoEMethod):
            return {name: shape}
        part = "w2_" if name.endswith(".down_proj.weight") else "w13_"
        leaves = (leaf.removeprefix(part) for leaf, _ in experts.named_parameters() if leaf.startswith(part))
        return {f"{name.rpartition('.')[0]}.{leaf}": {} for leaf in leaves if not leaf.startswith(FILLED_BY_VLLM)}


def _sizes(module: nn.Module, parameter: nn.Parameter, num_outputs: int) -> Sizes:
    """Return how much a checkpoint's part of a quantised layer has for `num_outputs`, in the dimension of outputs.

    vLLM takes of a larger tensor what the layer needs, as a tensor-parallel rank does, and says nothing.
    Nothing is known of a quantised LM head, which is padded.
    """
    output_dim = getattr(parameter, "output_dim", None)
    if not isinstance(module, LinearBase) or not isinstance(parameter, BasevLLMParameter) or output_dim is None:
        return {}
    size, rest = divmod(parameter.shape[output_dim] * num_outputs, module.output_size_per_partition)
    return {} if rest else {output_dim: size}
