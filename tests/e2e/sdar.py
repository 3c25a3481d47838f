"""A random SDAR model, the reference decoder on it, and requests for it."""

import dataclasses
import random
from pathlib import Path
from typing import Any

import torch

from tests.e2e.interference import check_interference
from tests.e2e.rig import MAX_MODEL_LEN, Case, Oracle, mixed_cases
from tests.e2e.wild import write_wild
from vllm_dllm.blocks import row_blocks
from vllm_dllm.config import DllmConfig
from vllm_dllm.names import PolicyName
from vllm_dllm.reference.block_causal import generate
from vllm_dllm.reference.policy import SDAR, Rules
from vllm_dllm.reference.qwen import Qwen, QwenConfig

CONFIG = {
    "architectures": ["SDARForCausalLM"],
    "model_type": "sdar",
    "block_size": 4,
    "hidden_act": "silu",
    "head_dim": 32,
    "hidden_size": 96,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 376,
    "max_position_embeddings": 1024,
    "mask_token_id": 3,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
POLICIES: tuple[PolicyName, ...] = (
    *("sequential", "static", "dynamic", "entropy_bounded"),
    *("random", "threshold", "factor", "margin", "entropy", "origin"),
)
"""SDAR's own policies, then the other families'."""


def make_wild_sdar(path: Path, mixing: float = 1.0) -> None:
    """Write a random SDAR model, see `wild.make_wild_checkpoint`."""
    write_wild(path, CONFIG, lambda config: Qwen(QwenConfig.from_json(config)), mixing)


class SdarOracle(Oracle):
    """The reference decoder on an SDAR checkpoint.

    Args:
        checkpoint: its folder.
        max_model_len: of the engine that it is compared with.
        rules: the family's.
        model: the reference model, by default SDAR's.
    """

    def __init__(
        self, checkpoint: Path, max_model_len: int = MAX_MODEL_LEN, rules: Rules = SDAR, model: Qwen | None = None
    ) -> None:
        model = model or Qwen.from_pretrained(checkpoint, torch.float32)
        super().__init__(checkpoint, model, rules, max_model_len)

    def _generate(self, case: Case, settings: dict[str, Any], **more: Any) -> Any:
        options = self._options(case, settings) | {"given": case.given} | more
        return generate(self.model, torch.tensor(case.prompt), **options)

    def _options(self, case: Case, settings: dict[str, Any]) -> dict[str, Any]:
        block_length = settings.get("block_length", CONFIG["block_size"])
        server = DllmConfig(block_length=block_length, kv_policy="block_causal")
        blocks = row_blocks(len(case.prompt), case.max_tokens, server, self.max_model_len)
        max_tokens = min(case.max_tokens, blocks.end - len(case.prompt))
        steps = case.steps and case.steps // -(-max_tokens // block_length)
        options = super()._options(dataclasses.replace(case, steps=steps), settings | {"block_length": block_length})
        return options | {"gen_length": blocks.end - len(case.prompt)}


def sdar_cases(block_length: int, seed: int) -> list[Case]:
    """Sixteen requests, see `mixed_cases`: prompts with and without a partial block, and with nothing but one."""
    rng = random.Random(seed)
    lengths = [1, block_length - 1, block_length, block_length + 1, 4 * block_length, 16, 31, 32, 33, 47]
    cases = []
    for case in mixed_cases(block_length, seed, POLICIES):
        prompt = tuple(rng.randrange(4, 100) for _ in range(max(1, rng.choice(lengths) % 64)))
        server = DllmConfig(block_length=block_length, kv_policy="block_causal")
        blocks = row_blocks(len(prompt), case.max_tokens, server, MAX_MODEL_LEN)
        per_block = rng.choice([n for n in range(1, block_length + 1) if block_length % n == 0])
        max_tokens = min(case.max_tokens, blocks.end - len(prompt))
        steps = None if case.steps is None else per_block * -(-max_tokens // block_length)
        cases.append(dataclasses.replace(case, prompt=prompt, steps=steps))
    return cases


def check_preemption_and_aborts(
    llm: Any, oracle: SdarOracle, settings: dict[str, Any], every: int | None = None
) -> None:
    """Abort a request and preempt all others after so many steps; their tokens stay those of the reference."""
    every = every or settings["block_length"] + 5
    cases = sdar_cases(settings["block_length"], seed=6)[:8]
    check_interference(llm, cases, lambda case: oracle.tokens(case, settings), lambda number: number % every == 5)
