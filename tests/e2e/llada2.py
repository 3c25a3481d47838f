"""A random LLaDA2 model, and the reference decoder on it."""

from pathlib import Path
from typing import Any

import torch

from tests.e2e import sdar
from tests.e2e.rig import MAX_MODEL_LEN
from tests.e2e.sdar import SdarOracle
from tests.e2e.wild import write_wild
from vllm_dllm.reference.llada2 import LLaDA2, LLaDA2Config
from vllm_dllm.reference.policy import LLADA2

CONFIG: dict[str, Any] = {
    **{name: value for name, value in sdar.CONFIG.items() if name not in ("block_size", "bos_token_id")},
    **{"architectures": ["LLaDA2MoeModelLM"], "model_type": "llada2_moe", "rope_theta": 600000.0},
    **{"num_experts": 8, "num_experts_per_tok": 3, "n_group": 2, "topk_group": 1, "num_shared_experts": 1},
    **{"moe_intermediate_size": 48, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5},
    **{"score_function": "sigmoid", "router_dtype": "fp32", "partial_rotary_factor": 0.5, "use_qk_norm": True},
}


def make_random(path: Path, mixing: float = 1.0) -> Path:
    """Write a random model, see `wild.make_wild_checkpoint`."""
    write_wild(path, CONFIG, lambda file: LLaDA2(LLaDA2Config.from_json(file)), mixing)
    return path


class LLaDA2Oracle(SdarOracle):
    """The reference decoder on a LLaDA2 checkpoint."""

    def __init__(self, checkpoint: Path, max_model_len: int = MAX_MODEL_LEN) -> None:
        super().__init__(checkpoint, max_model_len, LLADA2, LLaDA2.from_pretrained(checkpoint, torch.float32))
