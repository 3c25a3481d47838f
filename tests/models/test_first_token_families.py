"""Nemotron and Fast-dLLM v2: published configurations, names of tensors, layers as the reference's."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.e2e.first_token import CONFIGS
from tests.models.in_process import load, make_model, read_config, vllm_alone
from vllm_dllm.errors import ConfigError
from vllm_dllm.models.checkpoint_tensors import needed_tensors
from vllm_dllm.models.fast_dllm_config import FastDllmConfig
from vllm_dllm.models.nemotron_config import NemotronConfig
from vllm_dllm.reference.nemotron import Nemotron
from vllm_dllm.reference.qwen import Qwen, QwenConfig

# config.json of the published checkpoints, fields that matter.
NEMOTRON_8B: dict[str, Any] = {
    "architectures": ["NemotronLabsDiffusionModel"],
    "attention_bias": False,
    "block_size": 32,
    "bos_token_id": 1,
    "default_diffusion_steps": 32,
    "default_diffusion_threshold": 0.9,
    "default_generation_mode": "ar",
    "dlm_paradigm": "bidirectional",
    "eos_token_id": 11,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "mask_token_id": 100,
    "max_position_embeddings": 131072,
    "model_type": "nemotron_labs_diffusion",
    "num_attention_heads": 32,
    "num_hidden_layers": 34,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_parameters": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 8.0,
        "llama_4_scaling_beta": 0.1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 16384,
        "rope_theta": 1000000.0,
        "rope_type": "yarn",
    },
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 131072,
}
FAST_DLLM_7B: dict[str, Any] = {
    "architectures": ["Fast_dLLM_QwenForCausalLM"],
    "bd_size": 32,
    "bos_token_id": 151643,
    "conplemenrary_mask": True,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "layer_types": ["full_attention"] * 28,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "Fast_dLLM_Qwen",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for checkpoints, in a process that can make models."""
    path = tmp_path_factory.mktemp("first_token")
    with vllm_alone(path):
        yield path


def test_published_nemotron() -> None:
    config = NemotronConfig(**NEMOTRON_8B)
    assert (config.mask_token_id, config.eos_token_id, config.block_size) == (100, 11, 32)
    assert config.llama_4_scaling == {"beta": 0.1, "original_max_position_embeddings": 16384}
    assert config.num_positions == 131072
    assert not hasattr(config, "canvas_length")
    assert NemotronConfig.from_dict(config.to_dict()).llama_4_scaling == config.llama_4_scaling
    older = {k: v for k, v in NEMOTRON_8B.items() if k != "rope_parameters"}
    older["rope_scaling"] = {k: v for k, v in NEMOTRON_8B["rope_parameters"].items() if k != "rope_type"}
    older["rope_scaling"] |= {"type": "yarn", "max_position_embeddings": 131072}
    again = NemotronConfig(**older)
    assert (again.rope_parameters, again.llama_4_scaling) == (config.rope_parameters, config.llama_4_scaling)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dlm_paradigm": "other"}, "dlm_paradigm"),
        ({"rope_parameters": NEMOTRON_8B["rope_parameters"] | {"llama_4_scaling_beta": -1}}, "llama_4_scaling_beta"),
        ({"rope_parameters": NEMOTRON_8B["rope_parameters"] | {"mscale": None}}, "mscale"),
        ({"sliding_window": 4, "use_sliding_window": True}, "use_sliding_window"),
        ({"vision_config": {}}, "vision_config"),
    ],
)
def test_other_arithmetic_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        NemotronConfig(**NEMOTRON_8B | changes)


def test_published_fast_dllm() -> None:
    config = FastDllmConfig(**FAST_DLLM_7B)
    assert (config.mask_token_id, config.eos_token_id, config.block_size) == (151665, 151645, 32)


def test_published_tensors() -> None:
    names = needed_tensors(NemotronConfig(**NEMOTRON_8B))
    assert names["encoder.embed_tokens.weight"] == names["diffusion_head.weight"] == (131072, 4096)
    assert names["encoder.layers.33.self_attn.k_proj.weight"] == (1024, 4096)
    assert {re.sub(r"\.\d+\.", ".N.", name) for name in names} == {
        *("encoder.embed_tokens.weight", "encoder.norm.weight", "diffusion_head.weight"),
        *(f"encoder.layers.N.self_attn.{part}_proj.weight" for part in "qkvo"),
        *(f"encoder.layers.N.mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
        *(f"encoder.layers.N.{norm}_layernorm.weight" for norm in ("input", "post_attention")),
    }
    tied = needed_tensors(FastDllmConfig(**FAST_DLLM_7B | {"tie_word_embeddings": True}))
    assert "lm_head.weight" not in tied
    assert tied["model.layers.0.self_attn.q_proj.bias"] == (3584,)


@pytest.mark.parametrize("start", [0, 16_380])
@pytest.mark.parametrize("family", CONFIGS)
def test_logits_equal_the_references(family: str, start: int, folder: Path) -> None:
    """Also where Nemotron's queries are scaled: of the published original length, and of a small one."""
    config = CONFIGS[family] | {"max_position_embeddings": 131072}
    if family == "nemotron" and start:
        rope = CONFIGS[family]["rope_parameters"] | {"original_max_position_embeddings": 16384, "factor": 8.0}
        config |= {"rope_parameters": rope | {"max_position_embeddings": 131072}}
    elif family == "nemotron":
        config |= {"max_position_embeddings": 256}
    hf_config = read_config(folder, config).hf_config
    (folder / "reference.json").write_text((folder / "config.json").read_text())
    reference: Qwen = {"nemotron": Nemotron, "fast_dllm": Qwen}[family](QwenConfig.from_json(folder / "config.json"))
    generator = torch.Generator().manual_seed(0)
    for name, weight in reference.named_parameters():
        is_scale = weight.dim() == 1 and name.endswith("weight")
        torch.nn.init.normal_(weight, mean=float(is_scale), std=0.3, generator=generator)
    model = make_model(hf_config)
    unread = {"encoder.layers.0.self_attn.k_scale": torch.ones(1)} if family == "nemotron" else {}
    load(model, {**reference.state_dict(), **unread})
    ids: Tensor = torch.randint(0, 376, (40,), generator=generator)
    positions = torch.arange(start, start + 40)
    with torch.inference_mode():
        found = model.head_logits(model(ids, positions))
        expected = reference.eval()(ids, positions=positions)[0]
    torch.testing.assert_close(found, expected, rtol=2e-3 if start else 1e-4, atol=2e-3 if start else 2e-4)
