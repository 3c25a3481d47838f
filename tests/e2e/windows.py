"""A random Nemotron whose drafts come true now and then, with an adapter; autoregression as the oracle; requests."""

import dataclasses
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.e2e.first_token import CONFIGS
from tests.e2e.rig import MAX_MODEL_LEN, NUM_SLOTS, Case
from tests.e2e.wild import write_wild
from tests.reference.test_self_speculation import write_adapter
from vllm_dllm.reference.block_causal import generate_causally, store
from vllm_dllm.reference.nemotron import Nemotron, draft_model
from vllm_dllm.reference.qwen import QwenConfig
from vllm_dllm.reference.sampling import Sampling
from vllm_dllm.reference.self_speculation import SelfSpeculation, generate

MODE = {"mode": "self_speculation"}
MAX_WINDOW = 32


class Plain(Case):
    """A request without a policy."""

    def sampling_params(self, **changes: Any) -> Any:
        return super().sampling_params(**({"extra_args": None} | changes))


def make_checkpoint(path: Path, *, has_adapter: bool) -> None:
    """Write a random model whose ids look much alike: what is seen decides less than where, so that drafts agree."""
    config = CONFIGS["nemotron"] | {"block_size": MAX_WINDOW}
    write_wild(path, config, lambda file: Nemotron(QwenConfig.from_json(file)), 1.0)
    weights = load_file(path / "model.safetensors")
    embedding = weights["encoder.embed_tokens.weight"]
    embedding[:] = embedding[:1] + 0.15 * (embedding - embedding[:1])
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    if has_adapter:
        write_adapter(path, Nemotron.from_pretrained(path, torch.float32), scale=2.0)


class WindowOracle:
    """Autoregression on a checkpoint, and what self-speculation takes for it."""

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.model = Nemotron.from_pretrained(checkpoint, torch.float32)
        self.drafter = draft_model(self.model, checkpoint)
        self._tokens: dict[Case, list[int]] = {}

    def tokens(self, case: Case) -> list[int]:
        if case not in self._tokens:
            prompt, length = torch.tensor(case.prompt), self._length(case)
            self._tokens[case] = generate_causally(self.model, prompt, length, self._sampling(case)).tolist()
        return self._tokens[case]

    def log_probs(self, case: Case) -> torch.Tensor:
        """Return those of autoregression, [gen_length, vocab]: what each token could have been."""
        tokens = torch.tensor([*case.prompt, *self.tokens(case)])
        with torch.no_grad():
            logits, _ = store(self.model, tokens, 0, None, 1)
        return logits[len(case.prompt) - 1 : -1].double().log_softmax(-1)

    def speculative(self, case: Case) -> SelfSpeculation:
        prompt, sampling = torch.tensor(case.prompt), self._sampling(case)
        length = self._length(case)
        return generate(self.model, self.drafter, prompt, gen_length=length, max_window=MAX_WINDOW, sampling=sampling)

    def _length(self, case: Case) -> int:
        return min(case.max_tokens, MAX_MODEL_LEN - len(case.prompt))

    def _sampling(self, case: Case) -> Sampling:
        top_p = case.top_p if case.top_p < 1 else None
        return Sampling(temperature=case.temperature, seed=case.seed, top_k=case.top_k or None, top_p=top_p)


def mixed(seed: int, num: int = NUM_SLOTS) -> list[Case]:
    """Requests of odd lengths, greedy and sampled."""
    rng = random.Random(seed)
    return [
        Plain(
            prompt=tuple(rng.randrange(4, 100) for _ in range(rng.choice([1, 2, 7, 15, 16, 17, 33, 47]))),
            max_tokens=rng.choice([1, 2, 8, 9, 31, 33, 50, 61]),
            temperature=[0.0, 1.5][i % 2],
            top_k=rng.choice([0, 0, 5]),
            top_p=rng.choice([1.0, 1.0, 0.8]),
            seed=rng.randrange(-(2**63), 2**63),
        )
        for i in range(num)
    ]


def greedy(case: Case) -> Case:
    return dataclasses.replace(case, temperature=0.0)
