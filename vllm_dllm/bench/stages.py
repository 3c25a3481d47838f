"""Where the time of a step goes: self time of the stages, measured from inside the process."""

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from vllm import LLM

from vllm_dllm.bench.engine import request_params, start_engine
from vllm_dllm.bench.report import Row, Section
from vllm_dllm.bench.workload import EngineSpec, Workload

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


def stage_times(workload: Workload) -> list[Section]:
    """Measure steps in which nobody begins a block, at each concurrency, one token per step."""
    llm = start_engine(EngineSpec(workload))
    clock = StageClock()
    install(clock, llm)
    rows: list[Row] = []
    for concurrency in workload.concurrency:
        for i in range(concurrency):
            prompt = {"prompt_token_ids": list(workload.prompts[i % len(workload.prompts)])}
            llm.llm_engine.add_request(f"{concurrency}-{i}", prompt, request_params(workload, i))
        rows.append({"requests": concurrency, **_steps_ms(clock, llm, workload.block_length)})
    llm.llm_engine.engine_core.shutdown()
    return [Section("milliseconds per denoising step, by stage (self time)", rows)]


def _steps_ms(clock: StageClock, llm: LLM, block_length: int) -> dict[str, float]:
    """Step until all requests are done; returns the mean of the steps within blocks, in ms by stage.

    Raises: ValueError when there is one block only.
    """
    num_steps, total = 0, defaultdict[str, float](float)
    number = 0
    while llm.llm_engine.has_unfinished_requests():
        clock.seconds.clear()
        llm.llm_engine.step()
        # Step 0 takes the prompts in; then each block's first step refreshes. Block 0 warms up.
        if number > block_length and (number - 1) % block_length:
            num_steps += 1
            for stage, seconds in clock.seconds.items():
                total[stage] += seconds
        number += 1
    if num_steps == 0:
        raise ValueError(f"a generation has one block of {block_length}, two or more are needed; raise --gen-length")
    stages = {stage: 1e3 * seconds / num_steps for stage, seconds in sorted(total.items())}
    host = sum(ms for stage, ms in stages.items() if stage not in DEVICE_STAGES)
    return {**stages, "host total": host, "step": sum(stages.values())}
