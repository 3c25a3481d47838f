"""What is measured, as values: they travel between the processes of a measurement. Nothing here imports vLLM."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from vllm_dllm.calibrate.prompts import Message
from vllm_dllm.engine.telemetry import StepStats


class UnequalTokensError(RuntimeError):
    """Two decoders that must give the same tokens did not."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests that every decoder of a measurement is given.

    Attributes:
        model: path of the checkpoint.
        prompts: token ids of each prompt.
        gen_length: tokens to generate per prompt.
        block_length: positions denoised together.
        concurrency: how many requests are in flight at once; everything is measured with each of these.
        temperature, seed: of the requests; prompt i has seed + i.
        stop_at_eos: whether a generation ends at EOS; if not, everyone makes the same number of tokens.
        kv_cache_mib: memory for the K/V of each engine.
    """

    model: str
    prompts: tuple[tuple[int, ...], ...]
    gen_length: int = 128
    block_length: int = 32
    concurrency: tuple[int, ...] = (1, 4, 16)
    temperature: float = 0.0
    seed: int = 0
    stop_at_eos: bool = False
    kv_cache_mib: int = 512


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """An engine to start.

    Attributes:
        workload: the model, and how many requests there are at once.
        settings: of the server, without the block length.
        speculative_config: None without speculation.
        dtype: of weights and activations.
    """

    workload: Workload
    settings: dict[str, Any] = field(default_factory=dict)
    speculative_config: dict[str, Any] | None = None
    dtype: str = "float32"


@dataclass(slots=True)
class Measurement:
    """What decoding all prompts of a workload once took.

    Attributes:
        tokens: of each prompt.
        seconds: from the first request to the last token.
        stats: sums over the steps.
        step_ms: milliseconds of each step that only denoised, by (requests, drafts of each).
    """

    tokens: list[list[int]]
    seconds: float = 0.0
    stats: StepStats = field(default_factory=StepStats)
    step_ms: defaultdict[tuple[int, int], list[float]] = field(default_factory=lambda: defaultdict(list))

    @property
    def num_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(map(len, self.tokens))

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second."""
        return self.num_tokens / self.seconds

    @property
    def nfe(self) -> int:
        """Forwards, refreshes included, counted once for each request in them."""
        return self.stats.forwards + self.stats.refreshes

    def as_json(self) -> dict[str, Any]:
        """Return all that was measured but the tokens, for a JSON file."""
        return {
            "seconds": self.seconds,
            "num_tokens": self.num_tokens,
            "stats": asdict(self.stats),
            "steps": [
                {"requests": num_reqs, "budget": budget, "ms": ms} for (num_reqs, budget), ms in self.step_ms.items()
            ],
        }


def encode(model: str, conversations: Sequence[Sequence[Message]]) -> tuple[tuple[int, ...], ...]:
    """Put conversations into the chat template of a model; returns token ids."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    texts = [
        tokenizer.apply_chat_template(list(conversation), tokenize=False, add_generation_prompt=True)
        for conversation in conversations
    ]
    return tuple(tuple(tokenizer.encode(text, add_special_tokens=False)) for text in texts)
