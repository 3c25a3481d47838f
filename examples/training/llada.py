"""LLaDA's supervised fine-tuning (arXiv:2502.09992, alg. 2).

A sequence is prompt ++ answer ++ EOS up to the sequence's end. The prompt is never masked; each later token is masked
with a probability t, uniform in (0, 1) per sequence, and the cross-entropy of the masked tokens is weighted by 1/t.
The sequence length varies between batches, so that the model meets many lengths of EOS padding.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from data import BOS, EOS, EOT, MASK, mask_ratios
from torch import Tensor

from vllm_dllm.reference.model import LLaDA, LLaDAConfig

MAX_LENGTH = 256
SEQUENCE_LENGTHS = {32: 8, 40: 4, 56: 4, 72: 2, 104: 1, 136: 1}  # length: weight
LAYERS = "blocks"  # in the names of the layers' parameters
WRITERS = ("attn_out", "ff_out")  # matrices that write into the residual stream


def config_values(vocab_size: int) -> dict[str, object]:
    """Return config.json with the fields of the published LLaDA checkpoints."""
    return {
        "activation_type": "silu",
        "alibi": False,
        "alibi_bias_max": 8.0,
        "architectures": ["LLaDAModelLM"],
        "attention_dropout": 0.0,
        "attention_layer_norm": False,
        "attention_layer_norm_with_affine": True,
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "bos_token_id": BOS,
        "d_model": 128,
        "embedding_dropout": 0.0,
        "embedding_size": vocab_size,
        "eos_token_id": EOS,
        "eot_token_id": EOT,  # ours: no published field names it, and the id differs from LLaDA-8B's
        "flash_attention": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "init_cutoff_factor": None,
        "init_device": "meta",
        "init_fn": "mitchell",
        "init_std": 0.02,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "mask_token_id": MASK,
        "max_sequence_length": MAX_LENGTH,
        "mlp_hidden_size": 384,
        "mlp_ratio": 4,
        "model_type": "llada",
        "multi_query_attention": None,
        "n_heads": 2,
        "n_kv_heads": 2,
        "n_layers": 6,
        "pad_token_id": EOS,
        "precision": "amp_bf16",
        "residual_dropout": 0.0,
        "rms_norm_eps": 1e-05,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": 10000.0,
        "scale_logits": False,
        "torch_dtype": "bfloat16",
        "use_cache": False,
        "vocab_size": vocab_size,
        "weight_tying": False,
    }


def make_model(config: Path) -> LLaDA:
    """Build the model that a config.json describes."""
    return LLaDA(LLaDAConfig.from_json(config))


def masked_loss(model: LLaDA, ids: Tensor, is_response: Tensor) -> Tensor:
    """Estimate the bound of LLaDA (eq. 5): cross-entropy over masked response tokens, weighted by 1/t."""
    ratio = mask_ratios(ids.shape[0])[:, None]
    is_masked = is_response & (torch.rand(ids.shape) < ratio)
    with torch.autocast("cpu", torch.bfloat16):
        logits, _ = model(ids.masked_fill(is_masked, MASK))
    loss = F.cross_entropy(logits[is_masked].float(), ids[is_masked], reduction="none")
    weighted: Tensor = (loss / ratio.expand_as(ids)[is_masked]).sum() / is_response.sum()
    return weighted
