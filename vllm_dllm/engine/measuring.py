"""An engine in this process: start it, decode a workload, and note each step."""

import os
import time
from typing import Any

from vllm import LLM, EngineArgs, SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.metrics.stats import SchedulerStats

from vllm_dllm.engine import stats_way
from vllm_dllm.engine.kv_memory import kv_bytes
from vllm_dllm.engine.telemetry import StepStats
from vllm_dllm.measure.workload import EngineSpec, Measurement, Workload


def start_engine(spec: EngineSpec) -> LLM:
    """Start an engine with room for the workload, and with statistics, as a server has them.

    Several can be alive at once: each takes memory for its weights and for the K/V of the requests in flight.
    """
    # Steps are noted from inside the process; vLLM reads this when an engine is made.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    workload = spec.workload
    model_config = EngineArgs(workload.model, dtype=spec.dtype).create_model_config()
    max_model_len = min(spec.max_model_len, model_config.max_model_len)
    num_seqs = max(workload.concurrency)
    mib = workload.kv_cache_mib
    return LLM(
        workload.model,
        dtype=spec.dtype,
        max_model_len=max_model_len,
        max_num_seqs=num_seqs,
        kv_cache_memory_bytes=mib << 20 if mib else kv_bytes(model_config, num_seqs, max_model_len),
        # vLLM only compares this share with what is free, once the K/V memory is given; others may hold the rest.
        gpu_memory_utilization=0.01,
        distributed_executor_backend="uni",
        disable_log_stats=False,
        use_tqdm_on_load=False,
        additional_config={"dllm": {**spec.settings, "block_length": workload.block_length}},
        speculative_config=spec.speculative_config,
    )


def set_budget(llm: LLM, budget: int) -> None:
    """Have an engine with a fixed budget evaluate so many drafts in each step, at most those it was started with."""
    llm.llm_engine.engine_core.engine_core.scheduler.rule.fixed = budget


def request_params(workload: Workload, index: int) -> SamplingParams:
    """Return the sampling parameters of a prompt."""
    return SamplingParams(
        temperature=workload.temperature,
        seed=workload.seed + index,
        max_tokens=workload.gen_length,
        ignore_eos=not workload.stop_at_eos,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


class StepNotes(AggregateStatLoggerBase):
    """Takes the reports of steps where vLLM hands them to its loggers."""

    def __init__(self) -> None:
        self.last: StepStats | None = None

    def record(self, scheduler_stats: SchedulerStats | None, *args: Any, **kwargs: Any) -> None:
        """Keep the report of a step, None for a step that has none."""
        self.last = stats_way.take(scheduler_stats)

    def log_engine_initialized(self) -> None:
        """Say nothing."""


def measure(llm: LLM, notes: StepNotes, workload: Workload, concurrency: int) -> Measurement:
    """Decode all prompts once, with `concurrency` of them in flight as long as there are so many.

    Args:
        notes: among the engine's statistics loggers.
    """
    engine = llm.llm_engine
    result = Measurement([[] for _ in workload.prompts])
    num_added = num_finished = 0
    begin, cpu_begin = time.perf_counter(), time.process_time()
    while num_finished < len(workload.prompts):
        while num_added < min(len(workload.prompts), num_finished + concurrency):
            prompt = {"prompt_token_ids": list(workload.prompts[num_added])}
            engine.add_request(str(num_added), prompt, request_params(workload, num_added))
            num_added += 1
        step_begin = time.perf_counter()
        outputs = engine.step()
        _add_step(result, notes.last, (time.perf_counter() - step_begin) * 1e3)
        for output in outputs:
            result.tokens[int(output.request_id)] = list(output.outputs[0].token_ids)
        num_finished += len(outputs)
    result.seconds, result.cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu_begin
    return result


def _add_step(result: Measurement, step: StepStats | None, ms: float) -> None:
    if step is None:
        return
    result.stats.add(step)
    if not step.refreshes:
        (budget,) = step.budgets
        result.steps[step.forwards, budget].append((step.rows, ms))
