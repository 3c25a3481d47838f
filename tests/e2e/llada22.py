"""A random LLaDA2.2 model, requests that delete and insert, and what the reference makes of them."""

import dataclasses
import random
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.e2e.llada2 import CONFIG, LLaDA2Oracle
from tests.e2e.rig import Case
from tests.e2e.wild import write_wild
from vllm_dllm.reference.editing_rule import generate
from vllm_dllm.reference.indel_rule import Indel
from vllm_dllm.reference.llada2 import LLaDA2, LLaDA2Config

BLOCK, MAX_MODEL_LEN, MASK, DELETE, SPLIT = 32, 256, 3, 350, 351
FIELDS = {name: value for name, value in CONFIG.items() if name not in ("n_group", "topk_group")} | {
    **{"expert_capacity": 5, "block_size": BLOCK, "delete_token_id": DELETE, "split_token_id": SPLIT},
    "moe_shared_expert_intermediate_size": 40,
}


def make_random(path: Path) -> LLaDA2Oracle:
    """Write a random model that masks, deletes and splits now and then; return its reference."""
    write_wild(path, FIELDS, lambda file: LLaDA2(LLaDA2Config.from_json(file)), 0.2)
    weights = load_file(path / "model.safetensors")
    weights["lm_head.weight"][[MASK, DELETE, SPLIT]] *= 1.6
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return LLaDA2Oracle(path, MAX_MODEL_LEN)


@dataclasses.dataclass(frozen=True)
class IndelCase(Case):
    """A request that deletes and inserts, as the model's server does by itself."""

    edit_threshold: float = 0.0
    post_steps: int = 16
    drafts: bool = True

    def sampling_params(self, **changes: Any) -> Any:
        own = {"indel_edit_threshold": self.edit_threshold, "indel_post_steps": self.post_steps}
        extra = {f"dllm_{name}": value for name, value in {**own, "threshold": self.threshold}.items()}
        return super().sampling_params(
            extra_args=extra if self.drafts else extra | {"dllm_speculation": False}, **changes
        )

    def expected(self, oracle: LLaDA2Oracle, delete: int = DELETE, split: int = SPLIT) -> tuple[list[int], int]:
        """Return what the reference generates, and in how many steps."""
        rule = partial(Indel, self.threshold, self.edit_threshold, self.post_steps, delete, split)
        prompt = torch.tensor(self.prompt)
        made = generate(oracle.model, prompt, gen_length=self.max_tokens, block_length=BLOCK, rule=rule)
        return made.tokens[: self.max_tokens], made.nfe


def cases(seed: int, count: int) -> list[IndelCase]:
    rng = random.Random(seed)
    return [
        IndelCase(
            tuple(rng.randrange(4, 100) for _ in range(rng.choice([1, 31, 32, 45, 70]))),
            rng.choice([9, 33, 60]),
            threshold=rng.choice([0.05, 0.2, 0.5]),
            edit_threshold=rng.choice([0.0, 0.0, 0.1, 0.3]),
            post_steps=rng.choice([0, 2, 16]),
        )
        for _ in range(count)
    ]


def took(outputs: list[Any]) -> list[tuple[list[int], int]]:
    numbers = [output.kv_transfer_params["dllm"] for output in outputs]
    return [
        (list(output.outputs[0].token_ids), n["nfe"] + n["accepted"])
        for output, n in zip(outputs, numbers, strict=True)
    ]
