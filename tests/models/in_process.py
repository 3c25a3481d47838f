"""Our vLLM model class in the test's own process: configuration, layers, weights and logits without an engine."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from vllm_dllm.errors import ConfigError
from vllm_dllm.reference.llada2 import LLaDA2
from vllm_dllm.reference.model import LLaDA, LLaDAConfig
from vllm_dllm.reference.nemotron import Nemotron
from vllm_dllm.reference.qwen import Qwen

LLADA = {
    "architectures": ["LLaDAModelLM"],
    "model_type": "llada",
    "activation_type": "silu",
    "block_type": "llama",
    "layer_norm_type": "rms",
    "rope": True,
    "include_bias": False,
    "d_model": 24,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "mlp_hidden_size": 40,
    "mlp_ratio": 4,
    "vocab_size": 60,
    "embedding_size": 64,
    "max_sequence_length": 48,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "weight_tying": False,
    "mask_token_id": 3,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "torch_dtype": "float32",
}
SDAR = {
    "architectures": ["SDARForCausalLM"],
    "model_type": "sdar",
    "block_size": 4,
    "hidden_act": "silu",
    "head_dim": 8,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 48,
    "mask_token_id": 3,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
DREAM = {k: v for k, v in SDAR.items() if k != "block_size"} | {"architectures": ["DreamModel"], "model_type": "Dream"}
DIFFCODER = SDAR | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "auto_map": {"AutoModelForCausalLM": "modeling_seed_diffcoder.SeedDiffcoderForCausalLM"},
}
# Sizes of experts are those that vLLM's kernel for CPUs takes: multiples of 32, which it pads one of.
EXPERTS = {"hidden_size": 32, "num_experts": 6, "num_experts_per_tok": 3}
SDAR_MOE = (
    SDAR
    | EXPERTS
    | {"architectures": ["SDARMoeForCausalLM"], "model_type": "sdar_moe"}
    | {"moe_intermediate_size": 40, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
)
LLADA_MOE = (
    DREAM
    | EXPERTS
    | {"architectures": ["LLaDAMoEModelLM"], "model_type": "llada", "num_key_value_heads": 4, "qk_layernorm": True}
    | {"intermediate_size": None, "expert_intermediate_size": 40, "norm_topk_prob": None, "moe_layer_freq": [1, 1]}
    | {"moe_router_score_function": "softmax", "shared_expert_intermediate_size": None, "routed_scaling_factor": 1.0}
)
NEMOTRON = SDAR | {"architectures": ["NemotronLabsDiffusionModel"], "model_type": "nemotron_labs_diffusion"}
FAST_DLLM = DREAM | {"architectures": ["Fast_dLLM_QwenForCausalLM"], "model_type": "Fast_dLLM_Qwen", "bd_size": 4}
LLADA2 = {
    **{k: v for k, v in DREAM.items() if k != "bos_token_id"},
    **{"architectures": ["LLaDA2MoeModelLM"], "model_type": "llada2_moe", "hidden_size": 32, "head_dim": 12},
    **{"num_experts": 8, "num_experts_per_tok": 3, "n_group": 2, "topk_group": 1, "num_shared_experts": 1},
    **{"moe_intermediate_size": 40, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "router_dtype": "fp32"},
    **{"score_function": "sigmoid", "norm_topk_prob": True, "moe_router_enable_expert_bias": True},
    **{"partial_rotary_factor": 0.5, "use_bias": False, "use_qkv_bias": False, "use_qk_norm": True},
}
LLADA22 = {
    **{name: value for name, value in LLADA2.items() if name not in ("n_group", "topk_group")},
    **{"expert_capacity": 4, "block_size": 4, "moe_shared_expert_intermediate_size": 56},
    **{"delete_token_id": 6, "split_token_id": 7},
}
WEDLM = DREAM | {"architectures": ["WeDLMForCausalLM"], "model_type": "wedlm", "attention_bias": False}
TINY: dict[str, dict[str, Any]] = {
    "llada": LLADA,
    "dream": DREAM,
    "sdar": SDAR,
    "diffcoder": DIFFCODER,
    "llada_moe": LLADA_MOE,
    "sdar_moe": SDAR_MOE,
    "wedlm": WEDLM,
    "nemotron": NEMOTRON,
    "fast_dllm": FAST_DLLM,
    "llada2": LLADA2,
    "llada22": LLADA22,
}


class SeesAll(nn.Module):
    """In the place of vLLM's attention layer, which needs an engine's pages: each row attends to all."""

    def __init__(self, num_heads: int, head_dim: int, scale: float, num_kv_heads: int, **_: Any) -> None:
        super().__init__()
        self.shapes = [(num_heads, head_dim), (num_kv_heads, head_dim), (num_kv_heads, head_dim)]
        self.scale = scale

    def forward(self, *rows: Tensor) -> Tensor:
        """Map query, key and value, each [num_rows, heads * head_dim]."""
        query, key, value = (x.unflatten(-1, shape).transpose(0, 1) for x, shape in zip(rows, self.shapes, strict=True))
        out = F.scaled_dot_product_attention(query, key, value, scale=self.scale, enable_gqa=True)
        return out.transpose(0, 1).flatten(-2)


def as_served() -> Any:
    """vLLM's configuration of a model that is not compiled, as ours are served.

    What vLLM compiles by default is traced, which the end of another model's matmuls would disturb (`collected` in
    tests/conftest.py).
    """
    from vllm.config import CompilationConfig, CompilationMode, VllmConfig

    return VllmConfig(compilation_config=CompilationConfig(mode=CompilationMode.NONE))


@contextmanager
def vllm_alone(folder: Path) -> Iterator[None]:
    """Make this process the only rank, with the plugin; nothing is left behind for engines of later tests."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import (
        destroy_distributed_environment,
        destroy_model_parallel,
        init_distributed_environment,
        initialize_model_parallel,
    )

    from vllm_dllm.models import transformer
    from vllm_dllm.plugin import register

    register()
    with pytest.MonkeyPatch.context() as patch, set_current_vllm_config(as_served()):
        patch.setattr(transformer, "Attention", SeesAll)
        init_distributed_environment(1, 0, f"file://{folder}/store", 0, "gloo")
        initialize_model_parallel(1)
        try:
            yield
        finally:
            destroy_model_parallel()
            destroy_distributed_environment()


def read_config(folder: Path, config: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Any:
    """Return vLLM's `ModelConfig` of a config.json; raises ConfigError as we raised it."""
    from vllm.config import ModelConfig

    (folder / "config.json").write_text(json.dumps(config))
    try:
        return ModelConfig(
            model=str(folder), dtype="float32", skip_tokenizer_init=True, hf_overrides=dict(overrides or {})
        )
    except ValidationError as error:
        raised = error.errors()[0].get("ctx", {}).get("error")
        if isinstance(raised, ConfigError):
            raise raised from None
        raise


def make_model(hf_config: Any, quant_config: Any = None, load_format: str = "auto") -> Any:
    """Return our model without weights."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.models import ModelRegistry

    model_class = ModelRegistry._try_load_model_cls(hf_config.architectures[0])
    current = as_served()  # of this model alone, as layers of experts are found by their names in it
    dtypes = {"dtype": torch.float32, "head_dtype": torch.float32}
    model_config: Any = SimpleNamespace(hf_config=hf_config, hf_text_config=hf_config, **dtypes)
    current.model_config = model_config
    vllm_config = SimpleNamespace(
        model_config=model_config,
        quant_config=quant_config,
        cache_config=None,
        load_config=SimpleNamespace(load_format=load_format),
        parallel_config=current.parallel_config,
        additional_config={},
    )
    with set_current_vllm_config(current):
        model = model_class(vllm_config=vllm_config)
    model.current_config = current
    return model


def reference_of(config: Mapping[str, Any], folder: Path) -> LLaDA | Qwen:
    """Return the reference model of a config.json, with random weights."""
    path = folder / "reference.json"
    path.write_text(json.dumps(config))
    if config["architectures"] == ["LLaDAModelLM"]:
        model: LLaDA | Qwen = LLaDA(LLaDAConfig.from_json(path))
    else:
        own = {"NemotronLabsDiffusionModel": Nemotron, "LLaDA2MoeModelLM": LLaDA2}
        model_class = own.get(config["architectures"][0], Qwen)
        model = model_class(model_class.config_class.from_json(path))
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        is_scale = weight.dim() == 1 and name.endswith("weight")
        torch.nn.init.normal_(weight, mean=float(is_scale), std=0.3, generator=generator)
    return model.eval()


def logits_of(model: Any, ids: Tensor) -> Tensor:
    """Return [num_rows, vocab_size] logits of our model, for a row from position 0 on."""
    from vllm.forward_context import set_forward_context

    with torch.inference_mode(), set_forward_context(None, model.current_config):
        return model.head_logits(model(ids, torch.arange(len(ids))))


def load(model: Any, weights: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> None:
    """Load weights, and let the layers make of them what they compute with."""
    model.load_weights(weights.items() if isinstance(weights, Mapping) else weights)
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if method is not None:
            method.process_weights_after_loading(module)
