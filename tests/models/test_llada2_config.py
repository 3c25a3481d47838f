"""LLaDA2's published configurations, the names of its tensors, vLLM's choice of experts, and files that are refused."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models.in_process import LLADA2, LLADA22, load, make_model, read_config, reference_of, vllm_alone
from vllm_dllm.errors import ConfigError
from vllm_dllm.models.checkpoint_tensors import needed_tensors
from vllm_dllm.models.interface import FAMILY_BY_ARCHITECTURE
from vllm_dllm.models.llada2_config import LLaDA2Config
from vllm_dllm.reference.llada2 import Gate
from vllm_dllm.reference.llada2 import LLaDA2Config as ReferenceConfig

# Fields of the published checkpoints that matter; those of flash are of dFactory's copy.
MINI = {
    "architectures": ["LLaDA2MoeModelLM"],
    "attention_dropout": 0.0,
    "embedding_dropout": 0.0,
    "first_k_dense_replace": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "llada2_moe",
    "moe_intermediate_size": 512,
    "moe_router_enable_expert_bias": True,
    "n_group": 8,
    "norm_head": False,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 20,
    "num_key_value_heads": 4,
    "num_shared_experts": 1,
    "output_dropout": 0.0,
    "output_router_logits": False,
    "pad_token_id": 156892,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 600000,
    "rotary_dim": 64,
    "routed_scaling_factor": 2.5,
    "router_dtype": "fp32",
    "score_function": "sigmoid",
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "topk_group": 4,
    "use_bias": False,
    "use_qk_norm": True,
    "use_qkv_bias": False,
    "use_rmsnorm": True,
    "use_sliding_window": False,
    "vocab_size": 157184,
}
FLASH = MINI | {
    **{"hidden_size": 4096, "intermediate_size": 9216, "moe_intermediate_size": 1024, "num_hidden_layers": 32},
    **{"num_attention_heads": 32, "max_position_embeddings": 16384},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for checkpoints, in a process that can make models."""
    path = tmp_path_factory.mktemp("llada2")
    with vllm_alone(path):
        yield path


@pytest.mark.parametrize(("fields", "params", "active"), [(MINI, 16.3e9, 1.4e9), (FLASH, 102.9e9, 6.1e9)])
def test_published_configurations(fields: dict[str, Any], params: float, active: float) -> None:
    config = LLaDA2Config(**fields)
    changed = {name for name, value in fields.items() if getattr(config, name) != value}
    assert changed == {"rope_scaling", "sliding_window"}
    assert (config.mask_token_id, config.eos_token_id, config.eot_token_id) == (156895, None, 156892)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 600000, "partial_rotary_factor": 0.5}
    assert (config.num_dense_layers, config.shared_expert_intermediate_size) == (1, fields["moe_intermediate_size"])
    needed = needed_tensors(config)
    layers = fields["num_hidden_layers"]
    assert len(needed) == 3 + 6 * layers + 3 + (layers - 1) * (3 * 257 + 2)
    sizes = {name: torch.Size(shape).numel() for name, shape in needed.items()}
    assert sum(sizes.values()) == pytest.approx(params, rel=0.01)
    idle = sum(size for name, size in sizes.items() if ".experts." in name) * (256 - 8) / 256
    idle += sizes["model.word_embeddings.weight"] + sizes["lm_head.weight"]
    assert sum(sizes.values()) - idle < active


def test_every_published_tensor_has_a_place() -> None:
    from vllm_dllm.models.llada2 import LLaDA2MoeModelLM

    needed = needed_tensors(LLaDA2Config(**MINI | {"num_experts": 16}))
    mapped = {name: LLaDA2MoeModelLM.hf_to_vllm_mapper.map_name(name) for name in needed}
    heads = 2048 * 16 // 16 + 2 * 4 * 128
    assert needed["model.layers.3.attention.query_key_value.weight"] == (heads, 2048)
    assert {new.removeprefix("model.layers.0.") for new in mapped.values() if new.startswith("model.layers.0.")} == {
        *("self_attn.qkv_proj.weight", "self_attn.o_proj.weight", "self_attn.q_norm.weight", "self_attn.k_norm.weight"),
        *("input_layernorm.weight", "post_attention_layernorm.weight"),
        *("mlp.gate_up_proj.weight", "mlp.down_proj.weight"),
    }
    of_experts = {"mlp.gate.weight", "mlp.gate.expert_bias"}
    of_experts |= {f"mlp.shared_experts.{part}.weight" for part in ("gate_up_proj", "down_proj")}
    of_experts |= {f"mlp.experts.{i}.{part}_proj.weight" for i in range(16) for part in ("gate", "up", "down")}
    assert {new[15:] for new in mapped.values() if new.startswith("model.layers.7.mlp")} == of_experts
    assert mapped["model.word_embeddings.weight"] == "model.embed_tokens.weight"


def test_a_saved_configuration_is_read_again(tmp_path: Path) -> None:
    LLaDA2Config(**MINI).save_pretrained(tmp_path)
    again = LLaDA2Config.from_pretrained(tmp_path)
    for name in ("rope_parameters", "mask_token_id", "eot_token_id", "head_dim", "n_group", "num_dense_layers"):
        assert getattr(again, name) == getattr(LLaDA2Config(**MINI), name)


def test_merged_experts_of_fine_tuning_are_refused(tmp_path: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs

    (tmp_path / "config.json").write_text(json.dumps(LLADA2 | {"model_type": "llada2_moe_veomni"}))
    told = (
        r"^model_type in config\.json of .* is 'llada2_moe_veomni', but allowed is 'llada2_moe'; split .* --mode split"
    )
    with pytest.raises(ConfigError, match=told):
        EngineArgs(model=str(tmp_path), skip_tokenizer_init=True).create_engine_config()


FLASH22 = {name: value for name, value in FLASH.items() if name not in ("n_group", "topk_group")}
FLASH22 |= {"expert_capacity": 48, "max_position_embeddings": 131072, "rope_theta": 3e6}


def test_llada22_says_its_blocks_and_its_tokens() -> None:
    """A file that does not name them has those of the published model, by its vocabulary."""
    config = LLaDA2Config(**FLASH22)
    assert (config.block_size, config.expert_capacity) == (32, 48)
    assert (config.delete_token_id, config.split_token_id) == (156930, 156931)
    assert FAMILY_BY_ARCHITECTURE["LLaDA2MoeModelLM"].settings(config.block_size, config.edit_ids) == {
        **{"block_length": 32, "kv_policy": "block_causal", "policy": "indel", "threshold": 0.5},
        **{"indel_delete": 156930, "indel_split": 156931},
    }
    assert LLaDA2Config(**FLASH).edit_ids is None
    other = LLaDA2Config(**FLASH22 | {"vocab_size": 157000, "mask_token_id": 3})
    assert (other.delete_token_id, other.edit_ids) == (None, None)
    assert LLaDA2Config(**FLASH22 | {"moe_shared_expert_intermediate_size": 7}).shared_expert_intermediate_size == 7
    named = {"delete_token_id": 7, "split_token_id": 8, "block_size": 16}
    config = LLaDA2Config(**FLASH22 | named)
    assert {name: getattr(config, name) for name in named} == named


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"expert_capacity": 7}, r"^expert_capacity .* is 7, but a token has 8 of 256 experts; allowed are numbers"),
        ({"expert_capacity": 257}, r"^expert_capacity .* is 257, but a token has 8 of 256 experts"),
        ({"delete_token_id": 7}, r"^delete_token_id and split_token_id .* are 7 and None, .* three different ids"),
        ({"delete_token_id": 7, "split_token_id": 7}, r"^delete_token_id and split_token_id .* are 7 and 7"),
        ({"delete_token_id": 7, "split_token_id": 157184}, r"^split_token_id .* is 157184, but the vocabulary has"),
    ],
)
def test_what_llada22_cannot_do_is_told(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        LLaDA2Config(**FLASH22 | changes)


def test_the_family_says_the_published_decoder() -> None:
    family = FAMILY_BY_ARCHITECTURE["LLaDA2MoeModelLM"]
    settings = family.settings(None)
    assert (settings["policy"], settings["threshold"], settings["block_length"]) == ("dynamic", 0.95, 32)
    assert family.generation_defaults == {"temperature": 0.0, "max_new_tokens": 2048}


def routed(model: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the experts that vLLM chooses by logits [num_rows, num_experts], in their order, and their weights."""
    weights, chosen = model.model.layers[1].mlp.experts.router._compute_routing(logits, logits, None)
    order = chosen.long().argsort(1)
    return chosen.long().gather(1, order), weights.gather(1, order)


@pytest.mark.parametrize("groups", [(2, 1, 3), (4, 2, 3), (1, 1, 2), (2, 2, 8)])
def test_vllm_chooses_the_references_experts(groups: tuple[int, int, int], folder: Path) -> None:
    """With random scores, and with ties of experts and of groups; the same for a token alone and with others."""
    names = dict(zip(("n_group", "topk_group", "num_experts_per_tok"), groups, strict=True))
    fields = LLADA2 | names
    model = make_model(read_config(folder, fields).hf_config)
    gate = Gate(ReferenceConfig.from_json(folder / "config.json"))
    gate.weight = nn.Parameter(torch.eye(8))
    load(model, reference_of(fields, folder).state_dict())
    generator = torch.Generator().manual_seed(5)
    random = torch.randn(200, 8, generator=generator)
    ties = torch.randint(0, 2, (200, 8), generator=generator).float()
    bias = torch.randint(0, 2, (8,), generator=generator) / 4  # of which ties remain
    for logits, own in ((random, random[0]), (ties, bias), (torch.zeros(3, 8), torch.zeros(8))):
        model.model.layers[1].mlp.gate.expert_bias.data.copy_(own)
        gate.expert_bias.data = own.clone()
        chosen, weights = routed(model, logits)
        expected, expected_weights = gate(logits)
        order = expected.argsort(1)
        assert torch.equal(chosen, expected.gather(1, order))
        torch.testing.assert_close(weights, expected_weights.gather(1, order), rtol=1e-6, atol=0)
        for row in range(len(logits)):
            alone, weight = routed(model, logits[row : row + 1])
            assert torch.equal(alone[0], chosen[row])
            torch.testing.assert_close(weight[0], weights[row], rtol=1e-6, atol=0)  # sums of other lengths round so


@pytest.mark.parametrize(("capacity", "per_token", "block_size"), [(4, 3, 4), (3, 3, 5), (8, 2, 7), (5, 1, 1)])
def test_vllm_chooses_the_experts_of_a_block(capacity: int, per_token: int, block_size: int, folder: Path) -> None:
    """The reference's, with random scores and with ties; a block is routed alone as among others, whole or cut."""
    fields = LLADA22 | {"expert_capacity": capacity, "num_experts_per_tok": per_token, "block_size": block_size}
    model = make_model(read_config(folder, fields).hf_config)
    gate = Gate(ReferenceConfig.from_json(folder / "config.json"))
    gate.weight = nn.Parameter(torch.eye(8))
    load(model, reference_of(fields, folder).state_dict())
    generator = torch.Generator().manual_seed(5)
    random = torch.randn(40 * block_size - (block_size > 1), 8, generator=generator)
    ties = torch.randint(0, 2, (40 * block_size, 8), generator=generator).float()
    bias = torch.randint(0, 2, (8,), generator=generator) / 4
    num_sets = set()
    for logits, own in ((random, random[0]), (ties, bias), (torch.zeros(3, 8), torch.zeros(8))):
        model.model.layers[1].mlp.gate.expert_bias.data.copy_(own)
        gate.expert_bias.data = own.clone()
        chosen, weights = routed(model, logits)
        expected, expected_weights = gate(logits)
        order = expected.argsort(1)
        assert torch.equal(chosen, expected.gather(1, order))
        torch.testing.assert_close(weights, expected_weights.gather(1, order), rtol=1e-6, atol=0)
        for block, its, weight in zip(*(x.split(block_size) for x in (logits, chosen, weights)), strict=True):
            assert len(its.unique()) <= capacity
            alone, own_weight = routed(model, block)
            assert torch.equal(alone, its)
            torch.testing.assert_close(own_weight, weight, rtol=1e-6, atol=0)
            num_sets.add(tuple(its.unique().tolist()))
    assert len(num_sets) > 3 or capacity == 8


def test_scores_are_of_float32(folder: Path) -> None:
    """Two experts that bfloat16 cannot tell apart are told apart, with activations in bfloat16."""
    model = make_model(read_config(folder, LLADA2).hf_config)
    weights = reference_of(LLADA2, folder).state_dict()
    column = torch.zeros(8, 32)
    column[:, 0] = torch.tensor([1.0, 1.0 + 2**-12, 0, 0, 0, 0, 0, 0])
    load(model, weights | {"model.layers.1.mlp.gate.weight": column})
    rows = torch.zeros(1, 32, dtype=torch.bfloat16)
    rows[0, 0] = 1
    logits, _ = model.model.layers[1].mlp.gate(rows)
    assert logits.dtype == torch.float32
    assert logits[0, 1] - logits[0, 0] == 2**-12
