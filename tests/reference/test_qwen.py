"""The reference Qwen against transformers' Qwen2 and Qwen3, and its keys and values against forwards without them."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    OlmoeConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

from vllm_dllm.reference.qwen import Qwen, QwenConfig, block_causal

# float32 rounding, carried through three layers into logits of size 1 to 10
ROUNDING = {"rtol": 2e-5, "atol": 5e-5}
IDS = torch.tensor([5, 3, 3, 17, 36, 0, 1, 3, 8, 8, 21, 3, 2])

PUBLISHED_DREAM = {
    "architectures": ["DreamModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "mask_token_id": 151666,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "Dream",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "pad_token_id": 151643,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
PUBLISHED_SDAR = {
    "architectures": ["SDARForCausalLM"],
    "attention_bias": False,
    "block_size": 4,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "mask_token_id": 151669,
    "max_position_embeddings": 32768,
    "max_window_layers": 36,
    "model_type": "sdar",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def transformers_logits(model: Qwen, ids: Tensor, visible: Tensor) -> Tensor:
    """Run transformers' layers of the same kind with the same weights and the given attention mask [len, len]."""
    config = model.config
    shared = {
        name: getattr(config, name)
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    }
    shared |= {"num_key_value_heads": config.num_key_value_heads, "rms_norm_eps": config.rms_norm_eps}
    shared |= {"rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta}}
    shared |= {"tie_word_embeddings": config.tie_word_embeddings, "attn_implementation": "eager"}
    own = {"head_dim": config.head_dim, "attention_bias": False}
    if config.architecture in ("DreamModel", "Fast_dLLM_QwenForCausalLM"):
        other = Qwen2ForCausalLM(Qwen2Config(**shared))
    elif config.architecture == "SeedDiffcoderForCausalLM":
        other = LlamaForCausalLM(LlamaConfig(**own, **shared))
    elif config.num_experts:
        # OLMoE's layers normalise query and key over all heads at once; its experts are these without renormalisation.
        names = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")
        experts = {name: getattr(config, name) for name in names}
        other = Qwen3MoeForCausalLM(Qwen3MoeConfig(**own, **shared, **experts))
    else:
        other = Qwen3ForCausalLM(Qwen3Config(**own, **shared))
    missing = other.load_state_dict(fused(model.state_dict()), strict=not config.tie_word_embeddings)
    assert set(missing.missing_keys) <= {"lm_head.weight"}
    hidden = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    return other.eval()(ids[None], attention_mask=hidden[None, None], use_cache=False).logits[0]


def fused(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put the experts of a layer together, as transformers has them."""
    kept = {name: weight for name, weight in weights.items() if ".experts." not in name}
    layers = {name.partition(".experts.")[0] for name in weights.keys() - kept.keys()}
    for layer in layers:
        num = sum(name.startswith(f"{layer}.experts.") for name in weights) // 3
        parts = [
            [weights[f"{layer}.experts.{i}.{part}_proj.weight"] for i in range(num)] for part in ("gate", "up", "down")
        ]
        gate, up, down = (torch.stack(part) for part in parts)
        kept |= {f"{layer}.experts.gate_up_proj": torch.cat((gate, up), 1), f"{layer}.experts.down_proj": down}
    return kept


EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20}
CONFIGS = {
    "dream": {"architecture": "DreamModel"},
    "dream-mha": {"architecture": "DreamModel", "num_key_value_heads": 4, "rope_theta": 1e6},
    "dream-tied": {"architecture": "DreamModel", "tie_word_embeddings": True},
    "fast-dllm": {"architecture": "Fast_dLLM_QwenForCausalLM", "tie_word_embeddings": True},
    "sdar": {"architecture": "SDARForCausalLM"},
    "sdar-wide-heads": {"architecture": "SDARForCausalLM", "head_dim": 12, "num_key_value_heads": 1},
    "sdar-tied": {"architecture": "SDARForCausalLM", "tie_word_embeddings": True},
    "stable-diffcoder": {"architecture": "SeedDiffcoderForCausalLM", "rope_theta": 5e5},
    "sdar-moe": {"architecture": "SDARMoeForCausalLM", **EXPERTS},
    "llada-moe": {"architecture": "LLaDAMoEModelLM", "norm_topk_prob": False, "num_key_value_heads": 4, **EXPERTS},
}


@pytest.mark.parametrize("block_length", [13, 4, 1], ids=["full", "block-causal", "causal"])
@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_logits_equal_transformers(make_qwen, changes, block_length):
    model, visible = make_qwen(**changes), block_causal(len(IDS), block_length)
    with torch.no_grad():
        expected = transformers_logits(model, IDS, visible)
        assert_close(model(IDS, visible=visible)[0], expected, **ROUNDING)
        if block_length == len(IDS):
            assert_close(model(IDS)[0], expected, **ROUNDING)


def test_block_causal_sees_the_block_and_what_precedes():
    assert block_causal(5, 2).int().tolist() == [
        [1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1],
    ]


@pytest.mark.parametrize("block_length", [1, 4, 5])
def test_blocks_one_by_one_equal_one_masked_forward(make_qwen, block_length):
    model = make_qwen(architecture="SDARForCausalLM")
    expected, expected_kv = model(IDS, visible=block_causal(len(IDS), block_length))
    kv, logits = None, []
    for begin in range(0, len(IDS), block_length):
        block_logits, kv = model(IDS[begin : begin + block_length], begin, kv)
        logits.append(block_logits)
    assert_close(torch.cat(logits), expected, **ROUNDING)
    assert_close(kv, expected_kv, **ROUNDING)


@pytest.mark.parametrize("architecture", ["DreamModel", "SDARForCausalLM"])
def test_span_reads_kept_keys_and_values(make_qwen, architecture):
    """What a span sees beside itself is the earlier sequence, not the current one, at both sides."""
    model, (start, end) = make_qwen(architecture=architecture), (4, 9)
    _, kv = model(IDS)
    current = IDS.clone()
    current[start:end] = torch.tensor([11, 12, 13, 14, 15])
    span_logits, span_kv = model(current[start:end], start, kv)
    for old, new in zip(kv, span_kv, strict=True):
        for kept, updated in zip(old, new, strict=True):
            assert torch.equal(kept[:, :start], updated[:, :start])
            assert torch.equal(kept[:, end:], updated[:, end:])
    assert not torch.allclose(span_logits, model(current)[0][start:end])  # the rest of the sequence is stale


def test_versions_of_a_position_are_rotated_alike(make_qwen):
    """A training sequence: a noised copy of each block beside the clean row, under SDAR's own mask."""
    model, block_length = make_qwen(architecture="SDARForCausalLM"), 4
    clean, noised = IDS[:12], IDS[:12].flip(0)
    block = torch.arange(12) // block_length
    same, before = block[:, None] == block, block[:, None] > block
    visible = torch.cat((torch.cat((same, before), 1), torch.cat((torch.zeros_like(same), same | before), 1)))
    both, _ = model(torch.cat((noised, clean)), visible=visible, positions=torch.arange(12).repeat(2))
    _, kv = model(clean, visible=same | before)
    for begin in range(0, 12, block_length):
        prefix = [(key[:, :begin], value[:, :begin]) for key, value in kv]
        expected, _ = model(noised[begin : begin + block_length], begin, prefix)
        assert_close(both[begin : begin + block_length], expected, **ROUNDING)


def write_checkpoint(model: Qwen, folder: Path, **changes: object) -> None:
    values = asdict(model.config) | {"architectures": [model.config.architecture]} | changes
    (folder / "config.json").write_text(json.dumps(values))
    save_file(model.state_dict(), folder / "model.safetensors")


@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_experts_equal_olmoe(make_qwen, norm_topk_prob):
    """LLaDA-MoE's code is made of OLMoE's; this is its block of experts alone."""
    model = make_qwen(architecture="LLaDAMoEModelLM", norm_topk_prob=norm_topk_prob, **EXPERTS)
    own = model.model.layers[0].mlp
    config = OlmoeConfig(
        hidden_size=32, intermediate_size=20, num_experts=6, num_experts_per_tok=3, norm_topk_prob=norm_topk_prob
    )
    other = OlmoeSparseMoeBlock(config)
    other.load_state_dict(
        {name[4:]: weight for name, weight in fused({f"mlp.{n}": w for n, w in own.state_dict().items()}).items()}
    )
    x = torch.randn(1, 50, 32)
    with torch.no_grad():
        expected = other(x)
        assert_close(own(x), expected[0] if isinstance(expected, tuple) else expected, **ROUNDING)


def test_weights_of_experts_are_as_published_code_has_them(make_qwen):
    """In scalars, for one token: LLaDA-MoE keeps the probabilities, SDAR-MoE makes them add up to 1."""
    for architecture, renormalises in (("LLaDAMoEModelLM", False), ("SDARMoeForCausalLM", True)):
        layer = make_qwen(architecture=architecture, norm_topk_prob=renormalises, **EXPERTS).model.layers[0].mlp
        x = torch.randn(32)
        with torch.no_grad():
            probs = [math.exp(logit) for logit in layer.gate(x).tolist()]
            total = sum(probs)
            best = sorted(range(6), key=lambda i: -probs[i])[:3]
            scale = sum(probs[i] for i in best) if renormalises else total
            expected = sum(probs[i] / scale * layer.experts[i](x) for i in best)
            assert_close(layer(x[None])[0], expected, **ROUNDING)


@pytest.mark.parametrize("architecture", ["DreamModel", "SDARForCausalLM", "SeedDiffcoderForCausalLM"])
def test_from_pretrained(make_qwen, tmp_path, architecture):
    model = make_qwen(architecture=architecture)
    write_checkpoint(model, tmp_path)
    loaded = Qwen.from_pretrained(tmp_path, torch.float32)
    assert loaded.config == model.config
    assert torch.equal(loaded(IDS)[0], model(IDS)[0])


def test_parameter_names_are_the_published_ones(make_qwen):
    shared = {f"self_attn.{name}_proj.weight" for name in "qkvo"}
    shared |= {f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    shared |= {"input_layernorm.weight", "post_attention_layernorm.weight"}
    own = {
        "DreamModel": {f"self_attn.{name}_proj.bias" for name in "qkv"},
        "SDARForCausalLM": {"self_attn.q_norm.weight", "self_attn.k_norm.weight"},
    }
    for architecture, more in own.items():
        layer = {f"model.layers.0.{name}" for name in shared | more}
        names = set(make_qwen(architecture=architecture, num_hidden_layers=1).state_dict())
        assert names == layer | {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


def read(folder: Path, values: dict[str, object]) -> QwenConfig:
    (folder / "config.json").write_text(json.dumps(values))
    return QwenConfig.from_json(folder / "config.json")


def test_published_configs(tmp_path):
    dream = read(tmp_path, PUBLISHED_DREAM)
    assert (dream.architecture, dream.head_dim, dream.mask_token_id, dream.block_size) == (
        "DreamModel",
        128,
        151666,
        None,
    )
    sdar = read(tmp_path, PUBLISHED_SDAR)
    assert (sdar.architecture, sdar.head_dim, sdar.mask_token_id, sdar.block_size) == (
        "SDARForCausalLM",
        128,
        151669,
        4,
    )
    with torch.device("meta"):
        assert Qwen(sdar).model.layers[35].self_attn.q_proj.weight.shape == (4096, 2560)
        assert Qwen(dream).model.layers[27].self_attn.k_proj.weight.shape == (512, 3584)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"architectures": ["Qwen3ForCausalLM"]}, "architecture is 'Qwen3ForCausalLM'"),
    ],
)
def test_config_of_another_computation_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, PUBLISHED_SDAR | changes)
