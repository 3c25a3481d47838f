"""Decode prompts without drafts in an engine of this process, and record every step for a calibration."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vllm import LLM, SamplingParams

from vllm_dllm.calibrate.prompts import Message, encode
from vllm_dllm.calibrate.record import BlockRecorder
from vllm_dllm.calibrate.trace import BlockTrace, PromptTrace
from vllm_dllm.config import DllmConfig
from vllm_dllm.denoiser import Observation
from vllm_dllm.errors import ConfigError


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What the engine of a calibration is started with."""

    model: str
    settings: DllmConfig
    concurrency: int
    dtype: str
    kv_cache_memory_bytes: int | None


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a calibration has to know of a model."""

    family: str
    mask_token_id: int
    eos_token_id: int | None


class RecordingEngine:
    """An engine whose steps are recorded.

    Args:
        options: what it is started with. One process at a time: the steps are observed in place.
    """

    def __init__(self, options: EngineOptions) -> None:
        self._llm = LLM(
            options.model,
            dtype=options.dtype,
            max_num_seqs=options.concurrency,
            kv_cache_memory_bytes=options.kv_cache_memory_bytes,
            distributed_executor_backend="uni",
            additional_config={"dllm": options.settings.model_dump(exclude_none=True)},
        )
        self._runner = self._llm.llm_engine.model_executor.driver_worker.worker.model_runner
        config = self._llm.llm_engine.model_config.hf_config
        self.facts = ModelFacts(config.model_type, config.mask_token_id, config.eos_token_id)
        self._blocks: dict[str, list[BlockTrace]] = {}
        self._recorder = BlockRecorder(config.mask_token_id, self._keep)
        self._runner.model_state.denoiser.observer = self._observe

    def encode(self, conversation: Sequence[Message], gen_length: int) -> list[int]:
        """Return the token ids of a conversation, see `prompts.encode`.

        Raises: ConfigError when the model has no room for it and the generation.
        """
        tokenizer: Any = self._llm.get_tokenizer()
        ids = encode(tokenizer, conversation)
        room = self._llm.llm_engine.model_config.max_model_len
        if len(ids) + gen_length > room:
            shown = conversation[-1]["content"][:40]
            raise ConfigError(
                f"the prompt {shown!r} has {len(ids)} tokens and --gen-length is {gen_length}, but the model has "
                f"room for {room}; remove the prompt or choose a smaller --gen-length"
            )
        return ids

    def decode(
        self, prompts: dict[int, list[int]], gen_length: int, temperature: float, seed: int
    ) -> Iterator[PromptTrace]:
        """Decode prompts and yield the trace of each as it ends.

        Args:
            prompts: prompt_idx -> token ids.
            gen_length: positions that each generates, EOS or not.
            temperature: of all requests.
            seed: prompt i draws with seed + i.
        """
        engine = self._llm.llm_engine
        for prompt_idx, ids in prompts.items():
            params = SamplingParams(
                temperature=temperature, max_tokens=gen_length, ignore_eos=True, seed=seed + prompt_idx
            )
            engine.add_request(str(prompt_idx), {"prompt_token_ids": ids}, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    blocks = sorted(self._blocks.pop(output.request_id), key=lambda block: block.start)
                    prompt_idx = int(output.request_id)
                    yield PromptTrace(prompt_idx, seed + prompt_idx, tuple(blocks))

    def close(self) -> None:
        """Stop the engine."""
        self._llm.llm_engine.engine_core.shutdown()

    def _observe(self, seen: Observation) -> None:
        columns = (seen.canvas, seen.next_canvas, seen.candidates.token_ids, seen.candidates.log_probs)
        starts = seen.blocks.start.tolist()
        for row, steps in enumerate(zip(*(column.cpu().numpy() for column in columns), strict=True)):
            self._recorder.observe(int(seen.blocks.slots_np[row]), starts[row], steps)

    def _keep(self, slot: int, block: BlockTrace) -> None:
        # vLLM appends a random suffix to the ids that a user gives.
        request_id = self._runner.req_states.index_to_req_id[slot].split("-")[0]
        self._blocks.setdefault(request_id, []).append(block)
