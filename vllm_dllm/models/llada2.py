"""LLaDA2.0, 2.1 and 2.2 for vLLM: the shared layers with grouped experts, under Bailing's names."""

import re

from vllm.model_executor.models.utils import WeightsMapper

from vllm_dllm.models.transformer import MaskedDiffusionLM


class LLaDA2MoeModelLM(MaskedDiffusionLM):
    """LLaDA2.0, 2.1 and 2.2, mini and flash, and models of the same layers in other sizes."""

    hf_to_vllm_mapper = MaskedDiffusionLM.hf_to_vllm_mapper | WeightsMapper(
        orig_to_new_regex={
            re.compile(r"\bword_embeddings\b"): "embed_tokens",
            re.compile(r"\battention\.query_key_value\b"): "self_attn.qkv_proj",
            re.compile(r"\battention\.dense\b"): "self_attn.o_proj",
            re.compile(r"\battention\.(query|key)_layernorm\b"): r"self_attn.\1_layernorm",
        },
        orig_to_new_substr={".query_layernorm": ".q_norm", ".key_layernorm": ".k_norm"},
        orig_to_new_stacked={
            ".shared_experts.gate_proj": (".shared_experts.gate_up_proj", 0),
            ".shared_experts.up_proj": (".shared_experts.gate_up_proj", 1),
        },
    )
    packed_modules_mapping = {  # noqa: RUF012 - as in `MaskedDiffusionLM`; query, key and value are one tensor of files
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
