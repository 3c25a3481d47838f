"""Where the time of a step goes: self time of the stages, measured from inside the process."""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from vllm import LLM

from vllm_dllm.bench.decode import POLICIES, Row, encode, make_engine, sampling_params
from vllm_dllm.engine import sampler as sampler_module

# On a GPU these are kernels; the rest is what the host does in each step.
DEVICE_STAGES = ("forward", "head product", "row statistics")


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
    # Module.__call__ finds `forward` on the instance, but the sampler is called through its class.
    runner.sampler = _TimedSampler(runner.sampler, clock)


class _TimedSampler:
    """The sampler with its call timed; everything else is the sampler's."""

    def __init__(self, sampler: Any, clock: StageClock) -> None:
        self._sampler = sampler
        self._call = clock.timed(sampler, "unmask and emit")
        sampler.head_logits = clock.timed(sampler.head_logits, "head product")
        clock.wrap(sampler_module, "row_stats", "row statistics")

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)


def stage_times(args: argparse.Namespace, questions: Sequence[str]) -> list[Row]:
    """Measure steps in which nobody begins a block, at each concurrency."""
    llm = make_engine(args, max(args.concurrency))
    prompts = encode(llm, questions)
    clock = StageClock()
    install(clock, llm)
    params = sampling_params(args, POLICIES["static, 1 per step"])
    rows: list[Row] = []
    for concurrency in args.concurrency:
        for i in range(concurrency):
            prompt = {"prompt_token_ids": prompts[i % len(prompts)]}
            llm.llm_engine.add_request(f"{concurrency}-{i}", prompt, params)
        rows.append({"requests": concurrency, **_steps_ms(clock, llm, args.block_length)})
    llm.llm_engine.engine_core.shutdown()
    return rows


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
