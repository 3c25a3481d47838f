"""The reference LLaDA against transformers' Llama, and its keys and values against forwards without them."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaModel

from vllm_dllm.reference.layers import RMSNorm
from vllm_dllm.reference.model import LLaDA, LLaDAConfig

LLAMA_NAMES = {
    "attn_norm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_norm": "post_attention_layernorm",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}
# float32 rounding, carried through three layers into logits of size 1 to 10
ROUNDING = {"rtol": 2e-5, "atol": 5e-5}
IDS = torch.tensor([5, 3, 3, 17, 36, 0, 1, 3, 8, 8, 21, 3, 2])


def llama_logits(model: LLaDA, ids: Tensor) -> Tensor:
    """Run transformers' Llama with the same weights and an attention mask that hides nothing."""
    config = model.config
    llama = LlamaModel(
        LlamaConfig(
            hidden_size=config.d_model,
            intermediate_size=config.mlp_hidden_size,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            vocab_size=config.embedding_size,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            attention_bias=config.include_qkv_bias,
            attn_implementation="eager",
        )
    ).eval()
    weights = {name.removeprefix("model.transformer."): tensor for name, tensor in model.state_dict().items()}
    renamed = {"embed_tokens.weight": weights["wte.weight"], "norm.weight": weights["ln_f.weight"]}
    for name, tensor in weights.items():
        if name.startswith("blocks."):
            _, layer, part, kind = name.split(".")
            renamed[f"layers.{layer}.{LLAMA_NAMES[part]}.{kind}"] = tensor
            if kind == "bias":  # Llama has an output bias too
                renamed[f"layers.{layer}.self_attn.o_proj.bias"] = torch.zeros(config.d_model)
    llama.load_state_dict(renamed)
    visible = torch.zeros(1, 1, len(ids), len(ids))
    hidden = llama(ids[None], attention_mask=visible, use_cache=False).last_hidden_state[0]
    return hidden @ weights.get("ff_out.weight", weights["wte.weight"]).T


@pytest.mark.parametrize(
    "changes",
    [{}, {"n_kv_heads": 4, "rope_theta": 5e5}, {"weight_tying": True}, {"include_qkv_bias": True, "n_kv_heads": 1}],
    ids=["gqa", "mha", "tied", "bias"],
)
def test_logits_equal_llama_without_causal_mask(make_model, changes):
    model = make_model(**changes)
    with torch.no_grad():
        assert_close(model(IDS)[0], llama_logits(model, IDS), **ROUNDING)


def test_every_position_sees_the_last(model):
    changed = IDS.clone()
    changed[-1] = 9
    assert (model(IDS)[0] != model(changed)[0]).any(-1).all()


def test_leading_dimensions_are_independent(model):
    both = torch.stack((IDS, IDS.flip(0)))
    assert_close(model(both)[0], torch.stack([model(ids)[0] for ids in both]), **ROUNDING)


@pytest.mark.parametrize(("start", "end"), [(0, 5), (4, 9), (6, 13), (0, 13)])
def test_span_after_full_forward_repeats_its_rows(model, start, end):
    logits, kv = model(IDS)
    span_logits, span_kv = model(IDS[start:end], start, kv)
    assert_close(span_logits, logits[start:end], **ROUNDING)
    assert_close(span_kv, kv, **ROUNDING)


def test_span_reads_kept_keys_and_values(model):
    """What a span sees beside itself is the earlier sequence, not the current one, at both sides."""
    start, end = 4, 9
    _, kv = model(IDS)
    current = IDS.clone()
    current[start:end] = torch.tensor([11, 12, 13, 14, 15])
    span_logits, span_kv = model(current[start:end], start, kv)
    again, _ = model(current[start:end], start, span_kv)
    assert_close(again, span_logits, **ROUNDING)
    for old, new in zip(kv, span_kv, strict=True):
        for kept, updated in zip(old, new, strict=True):
            assert torch.equal(kept[:, :start], updated[:, :start])
            assert torch.equal(kept[:, end:], updated[:, end:])
    assert not torch.allclose(span_logits, model(current)[0][start:end])  # the rest of the sequence is stale


def test_norm_rounds_before_it_scales():
    norm = RMSNorm(3, 0.0).to(torch.bfloat16)
    norm.weight.data = torch.tensor([3.0, 3.0, 3.0], dtype=torch.bfloat16)
    x = torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16)
    unit = (x.float() / x.float().square().mean().sqrt()).to(torch.bfloat16)
    assert torch.equal(norm(x), 3 * unit)


def write_checkpoint(model: LLaDA, folder: Path, num_shards: int, **changes: object) -> None:
    (folder / "config.json").write_text(json.dumps(asdict(model.config) | changes))
    weights = model.state_dict()
    for shard in range(num_shards):
        names = sorted(weights)[shard::num_shards]
        save_file({name: weights[name] for name in names}, folder / f"model-{shard}.safetensors")


@pytest.mark.parametrize("num_shards", [1, 3])
def test_from_pretrained(model, tmp_path, num_shards):
    write_checkpoint(model, tmp_path, num_shards)
    loaded = LLaDA.from_pretrained(tmp_path, torch.float32)
    assert torch.equal(loaded(IDS)[0], model(IDS)[0])
    assert LLaDA.from_pretrained(tmp_path, torch.bfloat16)(IDS)[0].dtype == torch.bfloat16


def test_parameter_names_are_the_published_ones(make_model):
    names = set(make_model(n_layers=1).state_dict())
    layer = {f"model.transformer.blocks.0.{name}.weight" for name in LLAMA_NAMES}
    assert names == layer | {f"model.transformer.{name}.weight" for name in ("wte", "ln_f", "ff_out")}
    assert "model.transformer.ff_out.weight" not in make_model(weight_tying=True).state_dict()


def test_config_takes_missing_kv_heads_as_heads(model, tmp_path):
    write_checkpoint(model, tmp_path, 1, n_kv_heads=None, activation_type="silu", unknown_field=7)
    assert LLaDAConfig.from_json(tmp_path / "config.json").n_kv_heads == 4


def test_config_of_another_computation_is_refused(model, tmp_path):
    write_checkpoint(model, tmp_path, 1, alibi=True)
    with pytest.raises(ValueError, match=r"alibi is True in .*; the reference model implements False alone"):
        LLaDA.from_pretrained(tmp_path, torch.float32)
