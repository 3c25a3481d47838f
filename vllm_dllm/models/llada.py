"""LLaDA for vLLM (arXiv:2502.09992, 2505.19223): the shared layers under LLaDA's names."""

import re

from vllm.model_executor.models.utils import WeightsMapper

from vllm_dllm.models.transformer import MaskedDiffusionLM


class LLaDAModelLM(MaskedDiffusionLM):
    """LLaDA-8B-Base, LLaDA-8B-Instruct, LLaDA-1.5 and models of the same layers in other sizes."""

    hf_to_vllm_mapper = MaskedDiffusionLM.hf_to_vllm_mapper | WeightsMapper(
        orig_to_new_regex={
            re.compile(r"^model\.transformer\.ff_out\b"): "lm_head",
            re.compile(r"^model\.transformer\.wte\b"): "model.embed_tokens",
            re.compile(r"^model\.transformer\.ln_f\b"): "model.norm",
            re.compile(r"^model\.transformer\.blocks\b"): "model.layers",
            re.compile(r"\.([qkv]_proj)\b"): r".self_attn.\1",
            # Of quantisation configs, which may name modules without their path.
            re.compile(r"^attn_out$"): "self_attn.o_proj",
            re.compile(r"^ff_proj$"): "mlp.gate_proj",
            re.compile(r"^ff_out$"): "mlp.down_proj",
        },
        orig_to_new_substr={
            ".attn_out": ".self_attn.o_proj",
            ".attn_norm": ".input_layernorm",
            ".ff_norm": ".post_attention_layernorm",
            ".ff_proj": ".mlp.gate_proj",
            ".up_proj": ".mlp.up_proj",
            ".ff_out": ".mlp.down_proj",
        },
    )
