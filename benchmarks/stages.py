"""Where the time of a step goes: self time of the stages, measured from inside the process."""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from vllm import LLM

from vllm_dllm.engine.measuring import request_params, start_engine
from vllm_dllm.measure.decode import Policy
from vllm_dllm.measure.report import Row, Section
from vllm_dllm.measure.workload import EngineSpec, Workload

# On a GPU these are kernels; the rest is what the host does in each step.
DEVICE_STAGES = ("forward", "row statistics")


class StageClock:
    """Adds up the self time of wrapped callables: a stage's time without that of the stages it calls."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner = [0.0]

    def wrap(self, owner: Any, name: str, stage: str) -> None:
        """Time `owner.name` as `stage`."""
        setattr(owner, name, self.timed(getattr(owner, name), stage))

    def timed(self, call: Callable[..., Any], stage: str) -> Callable[..., Any]:
        """Return `call`, timed."""

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            begin = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                elapsed = time.perf_counter() - begin
                self.seconds[stage] += elapsed - self._inner.pop()
                self._inner[-1] += elapsed

        return wrapper


def install(clock: StageClock, llm: LLM) -> None:
    """Time the stages of an engine that runs in this process."""
    core = llm.llm_engine.engine_core.engine_core
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    state = runner.model_state
    clock.wrap(llm.llm_engine, "step", "front end and rest")
    clock.wrap(core.scheduler, "schedule", "schedule")
    clock.wrap(core.scheduler, "update_from_output", "schedule")
    clock.wrap(runner, "execute_model", "runner")
    clock.wrap(runner, "sample_tokens", "runner")
    clock.wrap(state, "preprocess_state", "layout")
    clock.wrap(state, "prepare_attn", "layout")
    clock.wrap(state, "prepare_inputs", "layout")
    clock.wrap(runner.model, "forward", "forward")
    clock.wrap(state.denoiser, "advance", "unmask")
    clock.wrap(state.denoiser, "head", "row statistics")


def stage_times(workload: Workload, policies: Sequence[Policy]) -> list[Section]:
    """Measure steps in which nobody begins a block, at each concurrency.

    All requests have the same prompt, so that their blocks begin together.
    """
    rows: list[Row] = []
    for policy in policies:
        llm = start_engine(EngineSpec(workload, policy.settings))
        clock = StageClock()
        install(clock, llm)
        for concurrency in workload.concurrency:
            for i in range(concurrency):
                prompt = {"prompt_token_ids": list(workload.prompts[0])}
                llm.llm_engine.add_request(f"{concurrency}-{i}", prompt, request_params(workload, i))
            stages = _steps_ms(clock, llm, workload.block_length)
            rows.append({"policy": policy.name, "requests": concurrency, **stages})
        llm.llm_engine.engine_core.shutdown()
    return [Section("milliseconds per denoising step, by stage (self time)", rows)]


def _steps_ms(clock: StageClock, llm: LLM, block_length: int) -> dict[str, float]:
    """Step until all requests are done; returns the mean of the steps within blocks, in ms by stage.

    Raises: ValueError when there is one block only.
    """
    total = defaultdict[str, float](float)
    num_steps, num_ends, was_end = 0, 0, False
    while llm.llm_engine.has_unfinished_requests():
        clock.seconds.clear()
        before = _computed_tokens(llm)
        llm.llm_engine.step()
        # A block begins behind the step that took in the prompt or ended the block before. Block 0 warms up.
        if num_ends > 1 and not was_end:
            num_steps += 1
            for stage, seconds in clock.seconds.items():
                total[stage] += seconds
        was_end = _computed_tokens(llm) != before
        num_ends += was_end
    if num_steps == 0:
        raise ValueError(f"a generation has one block of {block_length}, two or more are needed; raise --gen-length")
    stages = {stage: 1e3 * seconds / num_steps for stage, seconds in sorted(total.items())}
    host = sum(ms for stage, ms in stages.items() if stage not in DEVICE_STAGES)
    return {**stages, "host total": host, "step": sum(stages.values())}


def _computed_tokens(llm: LLM) -> list[int]:
    running = llm.llm_engine.engine_core.engine_core.scheduler.running
    return [request.num_computed_tokens for request in running]
