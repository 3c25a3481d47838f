"""Decode prompts without drafts in an engine of this process, and record every step for a calibration."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vllm import LLM, EngineArgs, SamplingParams
from vllm.tokenizers import cached_tokenizer_from_config

from vllm_dllm.blocks import row_blocks
from vllm_dllm.calibrate.prompts import Message, encode
from vllm_dllm.calibrate.record import BlockRecorder
from vllm_dllm.calibrate.trace import BlockTrace, PromptTrace
from vllm_dllm.config import DllmConfig
from vllm_dllm.denoiser import Observation
from vllm_dllm.draft.graph_schema import ModelShape
from vllm_dllm.engine.configs import rules_of, served_family
from vllm_dllm.engine.kv_memory import kv_bytes
from vllm_dllm.errors import ConfigError
from vllm_dllm.unmask.schedule import UnmaskRules


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What the engine of a calibration is started with.

    Attributes:
        model: name or path.
        settings: of the server.
        gen_length: positions that each prompt generates.
        concurrency: requests at a time.
        dtype: of weights and activations.
        kv_cache_memory_bytes: for the K/V; None is what `concurrency` requests of the longest prompt need.
    """

    model: str
    settings: DllmConfig
    gen_length: int
    concurrency: int
    dtype: str
    kv_cache_memory_bytes: int | None


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a calibration has to know of a model."""

    family: str
    shape: ModelShape | None
    mask_token_id: int
    eos_token_id: int | list[int] | None
    rules: UnmaskRules


class RecordingEngine:
    """An engine whose steps are recorded.

    Args:
        options: what it is started with. One process at a time: the steps are observed in place.
        conversations: the prompts; the engine has room for the longest one and its generation.

    Raises: ConfigError when the model has no room for a prompt and its generation.
    """

    def __init__(self, options: EngineOptions, conversations: Sequence[Sequence[Message]]) -> None:
        model_config = EngineArgs(options.model, dtype=options.dtype).create_model_config()
        tokenizer: Any = cached_tokenizer_from_config(model_config)
        self._options = options
        self.prompts = [encode(tokenizer, conversation) for conversation in conversations]
        for ids, conversation in zip(self.prompts, conversations, strict=True):
            _check_room(ids, conversation[-1]["content"], options, model_config.max_model_len)
        longest = max(map(len, self.prompts))
        needed = longest + options.gen_length + 2 * options.settings.block_length
        max_model_len = min(needed, model_config.max_model_len)
        self._llm = LLM(
            options.model,
            dtype=options.dtype,
            max_model_len=max_model_len,
            max_num_seqs=options.concurrency,
            kv_cache_memory_bytes=options.kv_cache_memory_bytes
            or kv_bytes(model_config, options.concurrency, max_model_len),
            # vLLM only compares this share with what is free, once the K/V memory is given; others may hold the rest.
            gpu_memory_utilization=0.01,
            distributed_executor_backend="uni",
            additional_config={"dllm": options.settings.model_dump(exclude_none=True)},
        )
        self._runner = self._llm.llm_engine.model_executor.driver_worker.worker.model_runner
        config = self._llm.llm_engine.model_config.hf_config
        rules = rules_of(self._llm.llm_engine.vllm_config)
        self.facts = ModelFacts(
            config.model_type, ModelShape.of(config.to_dict()), config.mask_token_id, config.eos_token_id, rules
        )
        self._stores_alone = served_family(model_config).stores_alone
        self._blocks: dict[str, list[BlockTrace]] = {}
        self._recorder = BlockRecorder(config.mask_token_id, self._keep)
        self._runner.model_state.denoiser.observer = self._observe

    def decode(self, indices: Iterable[int], temperature: float, seed: int) -> Iterator[PromptTrace]:
        """Decode prompts, EOS or not, and yield the trace of each as it ends.

        Args:
            indices: of the prompts to decode.
            temperature: of all requests.
            seed: prompt i draws with seed + i.
        """
        engine = self._llm.llm_engine
        for prompt_idx in indices:
            # To the end of the last block, behind which nothing would be denoised.
            max_tokens = self._room(len(self.prompts[prompt_idx]))
            params = SamplingParams(
                temperature=temperature, max_tokens=max_tokens, ignore_eos=True, seed=seed + prompt_idx
            )
            engine.add_request(str(prompt_idx), {"prompt_token_ids": self.prompts[prompt_idx]}, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    blocks = sorted(self._blocks.pop(output.request_id), key=lambda block: block.start)
                    prompt_idx = int(output.request_id)
                    yield PromptTrace(prompt_idx, seed + prompt_idx, tuple(blocks))

    def _room(self, prompt_len: int) -> int:
        """Return the positions of a prompt's blocks that are generated."""
        options, max_model_len = self._options, self._llm.llm_engine.model_config.max_model_len
        return row_blocks(prompt_len, options.gen_length, options.settings, max_model_len).end - prompt_len

    def close(self) -> None:
        """Stop the engine."""
        self._llm.llm_engine.engine_core.shutdown()

    def _observe(self, seen: Observation) -> None:
        done = seen.done
        columns = (seen.canvas, done.next_canvas, done.candidates.token_ids, done.candidates.log_probs)
        starts = seen.blocks.start.tolist()
        for row, steps in enumerate(zip(*(column.cpu().numpy() for column in columns), strict=True)):
            if self._stores_alone and steps[0][0] == self.facts.mask_token_id:
                continue  # it decided the block's first position by a row that says nothing of the others
            self._recorder.observe(int(seen.blocks.slots_np[row]), starts[row], steps)

    def _keep(self, slot: int, block: BlockTrace) -> None:
        # vLLM appends a random suffix to the ids that a user gives.
        request_id = self._runner.req_states.index_to_req_id[slot].split("-")[0]
        self._blocks.setdefault(request_id, []).append(block)


def _check_room(ids: Sequence[int], text: str, options: EngineOptions, max_model_len: int) -> None:
    blocks = row_blocks(len(ids), options.gen_length, options.settings, max_model_len)
    if blocks.end < len(ids) + options.gen_length:
        raise ConfigError(
            f"the prompt {text[:40]!r} has {len(ids)} tokens and --gen-length is {options.gen_length}, but the model "
            f"has room for {max_model_len} in blocks of {options.settings.block_length}; remove the prompt or choose a "
            "smaller --gen-length"
        )
