"""Random WeDLM models of both kinds of layers, the reference decoder on them, and requests for them."""

import dataclasses
import random
from pathlib import Path
from typing import Any

import torch

from tests.e2e.first_token import CONFIGS
from tests.e2e.rig import MAX_MODEL_LEN, NUM_SLOTS, Case
from tests.e2e.wild import write_wild
from vllm_dllm.reference import wedlm_spiffy
from vllm_dllm.reference.edits import Edits
from vllm_dllm.reference.qwen import Qwen, QwenConfig
from vllm_dllm.reference.sampling import Sampling
from vllm_dllm.reference.wedlm import Sliding, WindowRule, generate
from vllm_dllm.reference.wedlm_spiffy import SpiffySliding
from vllm_dllm.state.edits import LogitEdits

WINDOW = 16
MASK = 3
CONFIG: dict[str, Any] = {
    **{name: value for name, value in CONFIGS["fast_dllm"].items() if name not in ("bd_size", "conplemenrary_mask")},
    "architectures": ["WeDLMForCausalLM"],
    "model_type": "wedlm",
    "attention_bias": False,
    "mask_token_id": MASK,
}


@dataclasses.dataclass(frozen=True)
class WindowCase(Case):
    """A request whose window is decided by its own bound and penalty."""

    entropy_bound: float = 0.4
    position_penalty: float = 0.02

    def sampling_params(self, **changes: Any) -> Any:
        own = {"dllm_entropy_bound": self.entropy_bound, "dllm_position_penalty": self.position_penalty}
        return super().sampling_params(**({"extra_args": own} | changes))


def make_wild(path: Path, *, has_biases: bool) -> None:
    """Write a random model, see `wild.make_wild_checkpoint`."""
    config = CONFIG | {"attention_bias": has_biases}
    write_wild(path, config, lambda file: Qwen(QwenConfig.from_json(file)), 1.0)


class SlidingOracle:
    """The reference decoder on a checkpoint."""

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.model = Qwen.from_pretrained(checkpoint, torch.float32)
        self._made: dict[Case, Sliding] = {}

    def made(self, case: Case) -> Sliding:
        """Decode a case, once."""
        if case not in self._made:
            self._made[case] = generate(self.model, torch.tensor(case.prompt), **self._arguments(case))
        return self._made[case]

    def drafted(self, case: Case, num_drafts: int, stop_ids: tuple[int, ...] = ()) -> SpiffySliding:
        """Decode a case with drafts."""
        own = self._arguments(case)
        prompt = torch.tensor(case.prompt)
        return wedlm_spiffy.generate(self.model, prompt, num_drafts=num_drafts, stop_ids=stop_ids, **own)

    def _arguments(self, case: Case) -> dict[str, Any]:
        assert isinstance(case, WindowCase)
        return {
            "gen_length": min(case.max_tokens, MAX_MODEL_LEN - len(case.prompt)),
            "window": WINDOW,
            "rule": WindowRule(case.entropy_bound, case.position_penalty),
            "sampling": self._sampling(case),
            "limit": MAX_MODEL_LEN,
        }

    def tokens(self, case: Case) -> list[int]:
        tokens: list[int] = self.made(case).tokens.tolist()
        return tokens

    def _sampling(self, case: Case) -> Sampling:
        edits = dataclasses.asdict(case.edits)
        del edits["min_p"]
        return Sampling(
            temperature=case.temperature,
            seed=case.seed,
            top_k=case.top_k or None,
            top_p=case.top_p if case.top_p < 1 else None,
            min_p=case.edits.min_p if case.temperature else 0.0,
            forbidden_ids=(MASK,),
            edits=Edits(**edits | {"end_ids": (1,)}),
        )


def mixed(seed: int, num: int = NUM_SLOTS) -> list[WindowCase]:
    """Requests of odd lengths, greedy and sampled, cautious and bold; some ask for other logits."""
    rng = random.Random(seed)
    edited = [
        LogitEdits(repetition=1.3, frequency=0.4),
        LogitEdits(bias=((7, 9.0), (20, -3.0)), min_tokens=6),
        LogitEdits(bad_words=((11,), (7, 7))),
    ]
    return [
        WindowCase(
            prompt=tuple(rng.randrange(4, 100) for _ in range(rng.choice([1, 2, 7, 15, 16, 17, 33, 47]))),
            max_tokens=rng.choice([1, 2, 8, 15, 17, 33, 50, 61]),
            entropy_bound=rng.choice([1e-9, 0.4, 1.5, 3.0]),
            position_penalty=rng.choice([0.0, 0.02, 0.2]),
            temperature=[0.0, 1.2][i % 2],
            top_k=rng.choice([0, 0, 5]),
            top_p=rng.choice([1.0, 1.0, 0.8]),
            seed=rng.randrange(-(2**63), 2**63),
            **({"edits": rng.choice(edited)} if i % 5 == 4 else {}),
        )
        for i in range(num)
    ]
