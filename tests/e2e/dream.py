"""A random Dream model, and the reference decoder on it."""

import json
from pathlib import Path

import torch

from tests.e2e.rig import Oracle
from tests.e2e.wild import write_wild
from vllm_dllm.names import PolicyName
from vllm_dllm.reference.policy import DREAM
from vllm_dllm.reference.qwen import Qwen, QwenConfig

CONFIG = {
    "architectures": ["DreamModel"],
    "model_type": "Dream",
    "hidden_act": "silu",
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 376,
    "max_position_embeddings": 1024,
    "mask_token_id": 3,
    "eot_token_id": 6,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": 1024,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "torch_dtype": "float32",
}
PUBLISHED: tuple[PolicyName, ...] = ("static", "margin", "entropy", "origin", "threshold")
"""Dream's own policies and the one that Fast-dLLM adds."""
OTHERS: tuple[PolicyName, ...] = ("random", "factor", "sequential", "dynamic", "entropy_bounded")


def make_wild_dream(path: Path, mixing: float = 1.0) -> None:
    """Write a random Dream model, see `wild.make_wild_checkpoint`."""
    write_wild(path, CONFIG, lambda config: Qwen(QwenConfig.from_json(config)), mixing)
    # Dream's own names no temperature either.
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "pad_token_id": 1}))


def dream_oracle(checkpoint: Path) -> Oracle:
    """Return the reference decoder on a Dream checkpoint."""
    return Oracle(checkpoint, Qwen.from_pretrained(checkpoint, torch.float32), DREAM)
