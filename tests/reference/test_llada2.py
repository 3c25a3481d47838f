"""The reference LLaDA2 against transformers' GLM-4.5, whose layers it has, and its choice of experts in scalars."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

from tests.reference.conftest import randomised
from vllm_dllm.reference.llada2 import Gate, LLaDA2, LLaDA2Config
from vllm_dllm.reference.qwen import block_causal

ROUNDING = {"rtol": 2e-5, "atol": 5e-5}
IDS = torch.tensor([5, 3, 3, 17, 36, 0, 1, 3, 8, 8, 21, 3, 2])


def config(**changes: object) -> LLaDA2Config:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 12, "vocab_size": 37, "max_position_embeddings": 64}
    experts = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "n_group": 2, "topk_group": 1}
    experts |= {"num_shared_experts": 1, "first_k_dense_replace": 1}
    own = {"architecture": "LLaDA2MoeModelLM", "mask_token_id": 3, "eos_token_id": 1, "rope_theta": 6e5}
    return LLaDA2Config(**(sizes | experts | own | changes))


def glm(model: LLaDA2) -> Glm4MoeForCausalLM:
    """Return transformers' layers with the same weights."""
    own = model.config
    same = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    same += ("head_dim", "vocab_size", "num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group")
    same += ("first_k_dense_replace", "routed_scaling_factor", "rms_norm_eps")
    rope = {"rope_type": "default", "rope_theta": own.rope_theta, "partial_rotary_factor": own.partial_rotary_factor}
    experts = {"n_routed_experts": own.num_experts, "n_shared_experts": own.num_shared_experts, "norm_topk_prob": True}
    other = Glm4MoeForCausalLM(
        Glm4MoeConfig(
            **{name: getattr(own, name) for name in same},
            **experts,
            rope_parameters=rope,
            use_qk_norm=True,
            attention_bias=False,
            attn_implementation="eager",
        )
    )
    renamed = {
        **{"word_embeddings": "embed_tokens", "attention.dense": "self_attn.o_proj"},
        **{"attention.query_layernorm": "self_attn.q_norm", "attention.key_layernorm": "self_attn.k_norm"},
        "gate.expert_bias": "gate.e_score_correction_bias",
    }
    weights: dict[str, Tensor] = {}
    for name, weight in model.state_dict().items():
        if "query_key_value" in name:
            sizes = [heads * own.head_dim for heads in model.model.layers[0].attention.heads]
            for part, tensor in zip("qkv", weight.split(sizes), strict=True):
                weights[name.replace("attention.query_key_value", f"self_attn.{part}_proj")] = tensor
        elif ".experts." not in name:
            for old, new in renamed.items():
                name = name.replace(old, new)
            weights[name] = weight
    for i in range(own.first_k_dense_replace, own.num_hidden_layers):
        experts = model.model.layers[i].mlp.experts
        pairs = [torch.cat((expert.gate_proj.weight, expert.up_proj.weight)) for expert in experts]
        weights[f"model.layers.{i}.mlp.experts.gate_up_proj"] = torch.stack(pairs)
        down = torch.stack([expert.down_proj.weight for expert in experts])
        weights[f"model.layers.{i}.mlp.experts.down_proj"] = down
    other.load_state_dict(weights)
    return other.eval()


@pytest.mark.parametrize("block_length", [13, 4])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 4, "routed_scaling_factor": 1.0},
        {"partial_rotary_factor": 1.0, "num_key_value_heads": 4, "num_shared_experts": 2, "first_k_dense_replace": 0},
    ],
    ids=["two-groups", "four-groups", "whole-heads"],
)
def test_logits_equal_transformers(changes, block_length):
    torch.manual_seed(0)
    model, visible = randomised(LLaDA2(config(**changes))), block_causal(len(IDS), block_length)
    for layer in model.model.layers[model.config.first_k_dense_replace :]:
        layer.mlp.gate.expert_bias.data.normal_(std=0.3)
    hidden = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected = glm(model)(IDS[None], attention_mask=hidden[None, None], use_cache=False).logits[0]
        assert_close(model(IDS, visible=visible)[0], expected, **ROUNDING)


def gate_of_logits(**changes: object) -> Gate:
    """Return a choice of experts whose logits are its input."""
    gate = Gate(config(hidden_size=8, **changes))
    gate.weight.data = torch.eye(8)
    return gate


def chosen_in_scalars(
    logits: list[float], bias: list[float], per_group: int, kept: int, count: int
) -> dict[int, float]:
    """Return the weights of the chosen experts, in Python's numbers; the lower of equals first."""
    scores = [1 / (1 + math.exp(-logit)) for logit in logits]
    value = [score + b for score, b in zip(scores, bias, strict=True)]
    groups = [range(begin, begin + per_group) for begin in range(0, len(value), per_group)]
    best = sorted(groups, key=lambda group: -sum(sorted((value[i] for i in group), reverse=True)[:2]))[:kept]
    chosen = sorted(sorted(i for group in best for i in group), key=lambda i: -value[i])[:count]
    total = sum(scores[i] for i in chosen)
    return {i: scores[i] / total * 2.5 for i in chosen}


def test_experts_are_chosen_as_published_code_does():
    generator = torch.Generator().manual_seed(1)
    gate = gate_of_logits(n_group=4, topk_group=2)
    seen = set()
    for _ in range(200):
        logits, bias = torch.randn(8, generator=generator) * 2, torch.randn(8, generator=generator) * 0.4
        gate.expert_bias.data = bias
        chosen, weights = (row[0].tolist() for row in gate(logits[None]))
        expected = chosen_in_scalars(logits.tolist(), bias.tolist(), 2, 2, 3)
        assert set(chosen) == set(expected)
        assert_close(weights, [expected[i] for i in chosen], rtol=1e-5, atol=1e-6)
        seen.add(tuple(sorted(chosen)))
    assert len(seen) > 20


def test_a_group_scores_as_its_two_best():
    """The group of the best expert loses; the bias chooses and does not weigh."""
    gate = gate_of_logits(num_experts_per_tok=2)
    gate.expert_bias.data = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.9, 0.0])
    logits = torch.tensor([[9.0, -9.0, -9.0, -9.0, 0.5, 0.5, -2.0, -9.0]])
    chosen, weights = gate(logits)
    assert set(chosen[0].tolist()) in ({4, 6}, {5, 6})
    scores = torch.tensor([0.5, -2.0]).sigmoid()
    by_expert = dict(zip(chosen[0].tolist(), weights[0].tolist(), strict=True))
    assert by_expert[6] == pytest.approx(2.5 * (scores[1] / scores.sum()).item())


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_ties_are_decided_by_the_token_alone(levels):
    """Equal experts, equal groups and tokens that are all ties: the same in any company, and all weights are right."""
    rows = torch.randint(0, levels, (300, 8), generator=torch.Generator().manual_seed(levels)).float()
    gate = gate_of_logits()
    together, weights = gate(rows)
    for row in range(len(rows)):
        alone, weight = gate(rows[row : row + 1])
        assert torch.equal(alone[0], together[row])
        assert torch.equal(weight[0], weights[row])
    groups = (rows.view(-1, 2, 4).sigmoid()).topk(2).values.sum(-1)
    assert ((groups[torch.arange(300), together[:, 0] // 4]) == groups.amax(-1)).all()
    assert (together // 4 == together[:, :1] // 4).all()
    assert all(len(set(row)) == 3 for row in together.tolist())


def test_one_expert_is_not_renormalised():
    chosen, weights = gate_of_logits(num_experts_per_tok=1)(torch.tensor([[0.0, 3.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]]))
    assert (chosen.item(), weights.item()) == (1, pytest.approx(2.5 / (1 + math.exp(-3))))


def of_block_in_scalars(
    logits: list[list[float]], bias: list[float], capacity: int, count: int
) -> list[dict[int, float]]:
    """Return the weights of each token's experts in a block of LLaDA2.2; the lower of equals first."""
    scores = [[1 / (1 + math.exp(-logit)) for logit in row] for row in logits]
    value = [[score + b for score, b in zip(row, bias, strict=True)] for row in scores]
    experts = sorted(range(len(bias)), key=lambda i: (-max(row[i] for row in value), i))[:capacity]
    found = []
    for row, own in zip(value, scores, strict=True):
        chosen = sorted(experts, key=lambda i: (-row[i], i))[:count]
        found.append({i: own[i] / sum(own[j] for j in chosen) * 2.5 for i in chosen})
    return found


def test_a_block_chooses_experts_together():
    """Blocks that stand behind each other choose apart; the last one may be short."""
    generator = torch.Generator().manual_seed(2)
    gate = gate_of_logits(expert_capacity=4, block_size=5)
    differs = 0
    for _ in range(40):
        logits, bias = torch.randn(13, 8, generator=generator) * 2, torch.randn(8, generator=generator) * 0.4
        gate.expert_bias.data = bias
        chosen, weights = gate(logits)
        blocks = (block.tolist() for block in logits.split(5))
        expected = [its for block in blocks for its in of_block_in_scalars(block, bias.tolist(), 4, 3)]
        for own, weight, its in zip(chosen.tolist(), weights.tolist(), expected, strict=True):
            assert dict(zip(own, weight, strict=True)) == pytest.approx(its, rel=1e-5)
            differs += set(own) != set(chosen_in_scalars(logits[0].tolist(), bias.tolist(), 8, 1, 3))
    assert differs > 100


def test_drafts_of_a_block_are_routed_apart():
    torch.manual_seed(0)
    model = randomised(LLaDA2(config(expert_capacity=4, block_size=4, moe_shared_expert_intermediate_size=9)))
    blocks = torch.randint(5, 37, (6, 4))
    with torch.no_grad():
        together = model(blocks)[0]
        alone = torch.stack([model(block)[0] for block in blocks])
        assert_close(together, alone, **ROUNDING)
        whole = model(blocks[0].repeat(2), visible=block_causal(8, 4))[0]
        assert_close(whole[:4], alone[0], **ROUNDING)
        with pytest.raises(ValueError, match="start is 6, inside a block of 4"):
            model(blocks[0], 6)
