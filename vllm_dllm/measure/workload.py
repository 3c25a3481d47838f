"""What is measured, as values: they travel between the processes of a measurement. Nothing here imports vLLM."""

from collections import defaultdict
from dataclasses import asdict, dataclass, field
from typing import Any

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
        kv_cache_mib: memory for the K/V of each engine; None is what `concurrency` requests can take.
    """

    model: str
    prompts: tuple[tuple[int, ...], ...]
    gen_length: int = 128
    block_length: int = 32
    concurrency: tuple[int, ...] = (1, 4, 16)
    temperature: float = 0.0
    seed: int = 0
    stop_at_eos: bool = False
    kv_cache_mib: int | None = None


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """An engine to start.

    Attributes:
        workload: the model, and how many requests there are at once.
        settings: of the server, without the block length.
        speculative_config: None without speculation.
        dtype: of weights and activations.
        most_drafts: for which a step of a single request has room; the same for engines that are compared.
    """

    workload: Workload
    settings: dict[str, Any] = field(default_factory=dict)
    speculative_config: dict[str, Any] | None = None
    dtype: str = "float32"
    most_drafts: int = 0

    @property
    def max_model_len(self) -> int:
        """Positions that the longest prompt, its generation and what is in flight with its last block need."""
        workload = self.workload
        longest = max(map(len, workload.prompts))
        return longest + workload.gen_length + workload.block_length * (2 + self.most_drafts)


@dataclass(slots=True)
class Measurement:
    """What decoding all prompts of a workload once took.

    Attributes:
        tokens: of each prompt.
        seconds: from the first request to the last token.
        cpu_seconds: what the engine's process computed meanwhile, on all its threads.
        stats: sums over the steps.
        steps: rows and milliseconds of each step without a refresh, by (requests, most drafts of any of them).
    """

    tokens: list[list[int]]
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    stats: StepStats = field(default_factory=StepStats)
    steps: defaultdict[tuple[int, int], list[tuple[int, float]]] = field(default_factory=lambda: defaultdict(list))

    @property
    def num_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(map(len, self.tokens))

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second."""
        return self.num_tokens / self.seconds

    def as_json(self) -> dict[str, Any]:
        """Return all that was measured but the tokens, for a JSON file."""
        return {
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "num_tokens": self.num_tokens,
            "stats": asdict(self.stats),
            "steps": [
                {
                    "requests": num_reqs,
                    "budget": budget,
                    "rows": [rows for rows, _ in taken],
                    "ms": [ms for _, ms in taken],
                }
                for (num_reqs, budget), taken in self.steps.items()
            ],
        }
