"""Changes of a config.json, and what must become of each: served as the reference computes it, or refused by name."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.models.in_process import TINY
from tests.models.rope_changes import ABSENT, NOT_POSITIVE, NOT_SIZES, Change, query_scales, ropes

LLADA2 = ("llada2", "llada22")
EXPERTS = ("llada_moe", "sdar_moe", *LLADA2)
ROLES = {
    "llada": {
        "width": "d_model",
        "layers": "n_layers",
        "heads": "n_heads",
        "kv": "n_kv_heads",
        "inner": "mlp_hidden_size",
        "positions": "max_sequence_length",
        "tied": "weight_tying",
    },
    "qwen": {
        "width": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "kv": "num_key_value_heads",
        "inner": "intermediate_size",
        "positions": "max_position_embeddings",
        "tied": "tie_word_embeddings",
    },
}
ROLES["llada_moe"] = ROLES["qwen"] | {"inner": "expert_intermediate_size"}
ROLES["sdar_moe"] = ROLES["qwen"] | {"inner": "moe_intermediate_size"}
ROLES |= dict.fromkeys(LLADA2, ROLES["sdar_moe"])
OTHER_ARITHMETIC: dict[str, dict[str, Sequence[Any]]] = {
    "llada": {
        "activation_type": ("gelu", "swiglu", None, 1),
        "alibi": (True, "no"),
        "attention_layer_norm": (True,),
        "bias_for_layer_norm": (True,),
        "block_group_size": (2, None),
        "block_type": ("sequential", None),
        "clip_qkv": (8.0, False),
        "include_bias": (True,),
        "include_qkv_bias": (True,),
        "input_emb_norm": (True,),
        "layer_norm_type": ("default", "gemma_rms"),
        "layer_norm_with_affine": (False, None),
        "multi_query_attention": (True,),
        "rope": (False, None),
        "rope_full_precision": (False,),
        "scale_logits": (True,),
        "head_dim": (5, 12),
        "is_encoder_decoder": (True,),
    },
    "qwen": {
        "attention_bias": (True,),
        "dual_chunk_attention_config": ({"chunk_size": 8}, False),
        "hidden_act": ("gelu", None),
        "layer_types": (["sliding_attention"] * 2, ["full_attention"], "full_attention"),
        "mlp_bias": (True,),
        "partial_rotary_factor": (0.5, True),
        "use_mrope": (True,),
        "use_sliding_window": (True,),
        "is_encoder_decoder": (True,),
    },
}
OTHER_ARITHMETIC["diffcoder"] = {"pretraining_tp": (2, "1")}
OTHER_ARITHMETIC["llada_moe"] = {
    "clip_qkv": (8.0,),
    "moe_layer_freq": ([0, 1], 0, 2, "1"),
    "moe_router_enable_expert_bias": (True,),
    "moe_router_score_function": ("sigmoid",),
    "qk_layernorm": (False, None),
    "routed_scaling_factor": (2.5,),
    "router_num_group": (2,),
    "router_topk_group": (1,),
    "shared_expert_intermediate_size": (8,),
}
OTHER_ARITHMETIC["sdar_moe"] = {
    "decoder_sparse_step": (2, 0),
    "mlp_only_layers": ([0], 0),
    "norm_topk_prob": (None, 1),
    "shared_expert_intermediate_size": (8,),
}
OTHER_ARITHMETIC["llada2"] = {
    "block_size": (0, "4"),
    "delete_token_id": (5, -1),  # alone
    "expert_capacity": (48, 2, 0),
    "first_k_dense_replace": (-1, None, True, "1"),
    "image_token_offset": (157184,),
    "moe_router_enable_expert_bias": (False,),
    "moe_shared_expert_intermediate_size": (0,),
    "n_group": (3, 8, 0, None, 2.0),
    "norm_head": (True,),
    "norm_topk_prob": (False,),
    "num_shared_experts": (-1, True),
    "partial_rotary_factor": (0.1, 0.3, 0, 2, True, "0.5", None),
    "rotary_dim": (8, 0, 12),
    "routed_scaling_factor": (0, -1.0, None, "2.5"),
    "router_dtype": ("bf16", True),
    "score_function": ("softmax", True),
    "topk_group": (3, 0, None),
    "use_bias": (True,),
    "use_qk_norm": (False, None),
    "use_qkv_bias": (True,),
    "use_rmsnorm": (False,),
}
OTHER_ARITHMETIC["llada22"] = OTHER_ARITHMETIC["llada2"] | {
    "delete_token_id": (7, -1),
    "expert_capacity": (9, 2, 0),
    "n_group": (0, None, 2.0),  # its experts are in no groups
    "topk_group": (0, None),
}
OTHER_ARITHMETIC["nemotron"] = {"dlm_paradigm": ("other", 1), "vision_config": ({"hidden_size": 8},)}
UNKNOWN = {
    "num_experts": 8,
    "final_logit_softcapping": 30.0,
    "attention_multiplier": 0.5,
    "use_qk_norm": True,
    "residual_scale": False,
    "text_config": {"hidden_size": 8},
    "per_layer_config": {"0": {"hidden_size": 8}},
    "original_max_position_embeddings": 16,
    "model_max_length": 4,
}
HARMLESS = {
    "attention_dropout": 0.3,
    "initializer_range": 1.0,
    "use_cache": False,
    "transformers_version": "4.1",
    "temperature": 0.3,
    "flash_attention": True,
    "_attn_implementation_autoset": True,
    "quux": None,
}


@dataclass(frozen=True)
class Mutation:
    """Some changes of a family's configuration, in the file or by --hf-overrides."""

    family: str
    changes: tuple[Change, ...]
    by_overrides: bool = False
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> dict[str, Any]:
        """What is asked for, as one config.json."""
        merged = TINY[self.family] | self.fields
        if self.by_overrides and self.family == "llada" and "hidden_size" in merged:
            merged["d_model"] = merged.pop("hidden_size")  # a name of vLLM's, which overrides may have
        return {name: value for name, value in merged.items() if value is not ABSENT}

    @property
    def names(self) -> tuple[str, ...]:
        """Of which a refusal must have one."""
        return tuple(name for change in self.changes for name in change.names)


def changes_of(family: str) -> list[Change]:
    """Return all changes of a family."""
    kind = "llada" if family == "llada" else "qwen"
    role = ROLES.get(family, ROLES[kind])
    part = TINY[family].get("partial_rotary_factor", 1.0)
    found = [*_shapes(kind, family), *_numbers(kind, role), *_token_ids(), *ropes(role["positions"], part)]
    found += _others(family, kind) + (_experts(family) if family in EXPERTS else [])
    return found + (_of_llada2(family) if family in LLADA2 else [])


def _experts(family: str) -> list[Change]:
    """Return changes of numbers of experts."""
    # Two groups in llada2, blocks that have four in llada22.
    of_groups = {"llada2": ((8, 1), (4, 2), (12, 6)), "llada22": ((8, 1), (4, 2), (12, 4))}
    numbers = of_groups.get(family, ((1, 1), (3, 3), (17, 2)))
    found = [Change("experts", {"num_experts": n, "num_experts_per_tok": k}) for n, k in numbers]
    found += [Change("experts", {"num_experts_per_tok": 7}, ("num_experts_per_tok",))]
    return found + [
        Change("experts", {name: value}, (name,))
        for name in ("num_experts", "num_experts_per_tok")
        for value in (*NOT_SIZES, None, ABSENT)
    ]


def _shapes(kind: str, family: str) -> list[Change]:
    role = ROLES[kind]
    width, heads, kv = role["width"], role["heads"], role["kv"]
    found = [Change("shape", {heads: h, kv: k}) for h, k in ((2, 1), (6, 3), (3, 1), (6, 6), (4, None), (2, None))]
    widths = (64, 96) if family in EXPERTS else (16, 20, 34)  # vLLM's kernel for experts on CPUs takes these alone
    found += [Change("shape", {width: w}) for w in ((16, 32, 48) if kind == "llada" else widths)]
    found += [
        Change("shape", {heads: 5}, (heads,)) if kind == "llada" else Change("shape", {heads: 8, kv: 3}, (heads, kv)),
        Change("shape", {kv: 3}, (kv,)),
        Change("shape", {heads: 2, kv: 4}, (kv,)),
        Change("shape", {heads: 8, kv: 8} if kind == "llada" else {"head_dim": 7}, (heads, "head_dim")),
    ]
    if kind == "qwen":
        found += [Change("shape", {"head_dim": d}) for d in ((8, 16) if family in LLADA2 else (4, 10, None, ABSENT))]
        found.append(Change("shape", {"head_dim": None, heads: 5, kv: 5}, (heads,)))
    else:
        found += [Change("shape", {"hidden_size": 32, "d_model": 24}, ("hidden_size",), only="file")]
        found += [Change("shape", {"hidden_size": 48}, only="overrides")]
    for name in (width, heads):
        found += [Change("shape", {name: value}, (name,)) for value in (*NOT_SIZES, None, ABSENT)]
    found += [Change("shape", {name: value}, (name,)) for name in (kv, "head_dim") for value in NOT_SIZES]
    return found


def _numbers(kind: str, role: dict[str, str]) -> list[Change]:
    layers, inner, tied = role["layers"], role["inner"], role["tied"]
    found = [Change("layers", {layers: n}) for n in (1, 3)] + [Change("inner", {inner: n}) for n in (8, 41)]
    found += [Change("eps", {"rms_norm_eps": value}) for value in (1e-3, 0.1, 1)]
    found += [Change("tied", {tied: True}), *(Change("tied", {tied: v}, (tied,)) for v in (1, "true", None))]
    found += [
        Change("vocab", {"vocab_size": n, "embedding_size": n} if kind == "llada" else {"vocab_size": n})
        for n in (40, 71)
    ]
    for group, name in (("layers", layers), ("inner", inner), ("vocab", "vocab_size")):
        found += [
            Change(group, {name: value}, (name,))
            for value in (*NOT_SIZES, *((None, ABSENT) if name != "mlp_hidden_size" else ()))
        ]
    found += [Change("eps", {"rms_norm_eps": value}, ("rms_norm_eps",)) for value in (*NOT_POSITIVE, None)]
    if kind == "llada":
        found += [Change("inner", {inner: gone, "mlp_ratio": ratio}) for gone in (None, ABSENT) for ratio in (1, 2, 4)]
        found += [Change("inner", {inner: None, "mlp_ratio": gone}, (inner,)) for gone in (None, ABSENT)]
        found += [Change("inner", {"mlp_ratio": value}, ("mlp_ratio",)) for value in NOT_SIZES]
        found += [Change("vocab", {"embedding_size": gone}) for gone in (None, ABSENT, 60, 100)]
        found += [Change("vocab", {"embedding_size": 59}, ("embedding_size",))]
        found += [Change("shape", {"multi_query_attention": False}, ("multi_query_attention",))]
        found += [Change("shape", {"multi_query_attention": False, "n_kv_heads": kv}) for kv in (None, 4)]
    return found


def _token_ids() -> list[Change]:
    found = [
        Change("ids", {name: value})
        for name, value in (
            *(("eos_token_id", value) for value in ([1, 2], [5], 0, None)),
            *((f"{name}_token_id", value) for name in ("pad", "bos", "eot") for value in (None, 0, 7)),
            *(("mask_token_id", value) for value in (0, 39)),
        )
    ]
    for name in ("mask", "eos", "eot", "bos", "pad"):
        wrong: list[Any] = [-1, 999, 10**12, True, False, 3.0, "3", {}]
        wrong += [[], [1, -1], [1, 999], [True], [None]] if name == "eos" else [[3]]
        wrong += [None, ABSENT] if name == "mask" else []
        found += [Change("ids", {f"{name}_token_id": value}, (f"{name}_token_id",)) for value in wrong]
    found += [
        Change("ids", {"mask_token_id": 1}, ("mask_token_id",)),
        Change("ids", {"eos_token_id": [2, 3]}, ("mask_token_id",)),
    ]
    found += [Change("ids", {"eot_token_id": 3}, ("mask_token_id",))]
    return found


def _others(family: str, kind: str) -> list[Change]:
    other = {**OTHER_ARITHMETIC[kind], **OTHER_ARITHMETIC.get(family, {})}.items()
    if family == "wedlm":  # says by it whose layers it has
        other = [(name, values) for name, values in other if name != "attention_bias"]
    found = [Change(name, {name: value}, (name,)) for name, values in other for value in values]
    found += [Change(name, {name: value}, (name,)) for name, value in UNKNOWN.items() if name not in TINY[family]]
    # vLLM makes the name that it knows of this one.
    found += [Change("rotary_pct", {"rotary_pct": 0.5}, ("rotary_pct", "partial_rotary_factor"))]
    found += [Change(name, {name: value}) for name, value in HARMLESS.items()]
    if family in {"sdar", "diffcoder", "sdar_moe", "nemotron"}:
        found += [Change("block", {"block_size": value}) for value in (8, None, ABSENT)]
        found += [Change("block", {"block_size": value}, ("block_size",)) for value in NOT_SIZES]
    else:
        found += [Change("block", {"block_size": 8}, () if family in LLADA2 else ("block_size",))]
    if kind == "qwen":
        found += [Change("window", {"sliding_window": 8, "max_window_layers": 1})]
        found += [Change("layers", {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3})]
    if family == "fast_dllm":
        found += [Change("trained block", {"bd_size": value}) for value in (8, None, ABSENT)]
        found += [Change("trained block", {"bd_size": value}, ("bd_size",)) for value in NOT_SIZES]
    if family == "nemotron":
        found += query_scales()
    if family == "wedlm":
        found += [Change("bias", {"attention_bias": value}) for value in (True, False, ABSENT)]
        found += [Change("bias", {"attention_bias": value, "qk_norm": not value}) for value in (True, False)]
        found += [Change("bias", {"attention_bias": value, "qk_norm": value}, ("qk_norm",)) for value in (True, False)]
        found += [Change("bias", {"attention_bias": value}, ("attention_bias",)) for value in (None, 1, "yes")]
    if family == "llada_moe":  # the published code reads no answer here
        found += [Change("norm", {"norm_topk_prob": value}) for value in (True, False, None)]
    if family == "sdar_moe":
        found += [Change("norm", {"norm_topk_prob": value}) for value in (True, False, ABSENT)]
    return found


def _of_llada2(family: str) -> list[Change]:
    """Return changes of fields that LLaDA2 alone has."""
    found: list[Change] = []
    if family == "llada2":
        groups = ((8, 2, 2), (8, 4, 3), (8, 1, 1), (4, 2, 2))
        names = ("num_experts", "n_group", "topk_group")
        found += [Change("experts", dict(zip(names, numbers, strict=True))) for numbers in groups]
    found += [Change("scale", {"routed_scaling_factor": value}) for value in (1, 0.5, 4.0)]
    found += [Change("shared", {"num_shared_experts": value}) for value in (0, 2, None, ABSENT)]
    found += [Change("dense", {"first_k_dense_replace": value}) for value in (0, 2, 9, ABSENT)]
    found += [Change("part", {"partial_rotary_factor": value}) for value in (1, 1 / 3, ABSENT)]
    found += [Change("part", {"rotary_dim": value}) for value in (6, None)]
    found += [Change("same", {"moe_shared_expert_intermediate_size": value}) for value in (40, None)]
    return found


def draw(seed: int) -> Mutation:
    """Return the mutation of a seed: one change in half of them, else two or three."""
    rng = random.Random(seed)
    family = rng.choice(list(TINY))
    by_overrides = rng.random() < 0.4
    route = "overrides" if by_overrides else "file"
    pool = [change for change in changes_of(family) if change.only in (None, route)]
    if by_overrides:  # a field cannot be taken out by them
        pool = [change for change in pool if ABSENT not in change.fields.values()]
    served = [change for change in pool if not change.names]
    first = rng.choice(served if rng.random() < 0.5 else pool)
    changes, groups, fields = [first], {first.group}, dict(first.fields)
    for change in rng.sample(served, rng.choice([0, 0, 1, 2])):
        if change.group not in groups and fields.keys().isdisjoint(change.fields):
            changes.append(change)
            groups.add(change.group)
            fields |= change.fields
    return Mutation(family, tuple(changes), by_overrides, fields)
