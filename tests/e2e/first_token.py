"""Random models of Nemotron and Fast-dLLM v2, the reference decoder on them, and requests for them."""

import dataclasses
import random
from pathlib import Path
from typing import Any

import torch

from tests.e2e.rig import MAX_MODEL_LEN, Case, Oracle, mixed_cases
from tests.e2e.sdar import POLICIES
from tests.e2e.wild import write_wild
from vllm_dllm.blocks import RowBlocks, row_blocks
from vllm_dllm.config import DllmConfig
from vllm_dllm.models.interface import FAMILY_BY_ARCHITECTURE
from vllm_dllm.reference.block_causal import generate
from vllm_dllm.reference.nemotron import Nemotron
from vllm_dllm.reference.policy import FAST_DLLM, NEMOTRON
from vllm_dllm.reference.qwen import Qwen, QwenConfig

_SIZES = {
    "hidden_act": "silu",
    "head_dim": 32,
    "hidden_size": 96,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 376,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
CONFIGS: dict[str, dict[str, Any]] = {
    "nemotron": _SIZES
    | {
        "architectures": ["NemotronLabsDiffusionModel"],
        "model_type": "nemotron_labs_diffusion",
        "dlm_paradigm": "bidirectional",
        "block_size": 8,
        "mask_token_id": 50,  # which prompts have, too
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 256,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 16.0,
            "original_max_position_embeddings": 16,
            "max_position_embeddings": 256,
            "llama_4_scaling_beta": 0.1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    },
    "fast_dllm": _SIZES
    | {
        "architectures": ["Fast_dLLM_QwenForCausalLM"],
        "model_type": "Fast_dLLM_Qwen",
        "bd_size": 16,
        "conplemenrary_mask": True,
        "mask_token_id": 3,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 1024,
        "rope_theta": 1e4,
    },
}
_RULES = {"nemotron": NEMOTRON, "fast_dllm": FAST_DLLM}


def make_wild(family: str, path: Path, mixing: float = 1.0) -> None:
    """Write a random model, see `wild.make_wild_checkpoint`."""
    model = {"nemotron": Nemotron, "fast_dllm": Qwen}[family]
    write_wild(path, CONFIGS[family], lambda config: model(QwenConfig.from_json(config)), mixing)


class FirstTokenOracle(Oracle):
    """The reference decoder on a checkpoint of one of the two families.

    Args:
        checkpoint: its folder.
        family: a key of `CONFIGS`.
        max_model_len: of the engine that it is compared with.
    """

    def __init__(self, checkpoint: Path, family: str, max_model_len: int = MAX_MODEL_LEN) -> None:
        model: Qwen = {"nemotron": Nemotron, "fast_dllm": Qwen}[family].from_pretrained(checkpoint, torch.float32)
        super().__init__(checkpoint, model, _RULES[family], max_model_len)
        self.family = FAMILY_BY_ARCHITECTURE[CONFIGS[family]["architectures"][0]]

    def blocks(self, case: Case) -> RowBlocks:
        """Return the blocks that an engine decodes of a case."""
        assert isinstance(self.model, Qwen)
        server = DllmConfig(**self.family.settings(self.model.config.block_size))
        return row_blocks(len(case.prompt), case.max_tokens, server, self.max_model_len)

    def _generate(self, case: Case, settings: dict[str, Any], **more: Any) -> Any:
        assert isinstance(self.model, Qwen)
        block_length, blocks = self.model.config.block_size, self.blocks(case)
        max_tokens = min(case.max_tokens, blocks.end - len(case.prompt))
        steps = case.steps and case.steps // -(-max_tokens // block_length)
        own = {"block_length": block_length}
        options = self._options(dataclasses.replace(case, steps=steps), settings | own)
        options |= {"gen_length": max_tokens if self.rules.attention == "causal" else blocks.end - len(case.prompt)}
        return generate(self.model, torch.tensor(case.prompt), **options, **more)

    def cases(self, seed: int) -> list[Case]:
        """Return sixteen requests, see `mixed_cases`: prompts of any length, the mask token in some of Nemotron's."""
        assert isinstance(self.model, Qwen)
        rng, length = random.Random(seed), self.model.config.block_size
        lengths = [1, length - 1, length, length + 1, 2 * length, 31, 32, 33, 47]
        cases = []
        for case in mixed_cases(length, seed, POLICIES):
            prompt = tuple(rng.randrange(4, 100) for _ in range(max(1, rng.choice(lengths))))
            case = dataclasses.replace(case, prompt=prompt)
            blocks = self.blocks(case)
            per_block = rng.choice([n for n in range(1, length + 1) if length % n == 0])
            max_tokens = min(case.max_tokens, blocks.end - len(prompt))
            steps = None if case.steps is None else per_block * -(-max_tokens // length)
            cases.append(dataclasses.replace(case, steps=steps))
        return cases
