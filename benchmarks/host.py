"""Tokens per second, and what the host does in a step besides the model and its LM head, in one process on a CPU.

    python -m benchmarks.host CHECKPOINT --budget auto

Run it in two checkouts in turn to compare them: it uses nothing but `LLM` and the runner's model and LM head.
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the model is timed in this process

PROMPT_LEN, NUM_TOKENS = 40, 64


def _timed(function: Callable[..., Any], spent_s: list[float]) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent_s[0] += time.perf_counter() - begin

    return timed


def measure(llm: Any, num_reqs: int, policy: str, spent_s: list[float]) -> dict[str, float]:
    """Return tokens per second, and milliseconds of the host per step, of the faster of two runs."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, extra_args={"dllm_policy": policy})
    prompts = [{"prompt_token_ids": list(range(5 + i, 5 + i + PROMPT_LEN))} for i in range(num_reqs)]
    runs = []
    for _ in range(3):  # the first one warms up
        spent_s[0], num_steps, engine = 0.0, 0, llm.llm_engine
        begin = time.perf_counter()
        for i, prompt in enumerate(prompts):
            engine.add_request(str(i), prompt, params)
        while engine.has_unfinished_requests():
            engine.step()
            num_steps += 1
        wall_s = time.perf_counter() - begin
        runs.append((wall_s, num_steps, spent_s[0]))
    wall_s, num_steps, model_s = min(runs[1:])
    return {"tokens_per_s": num_reqs * NUM_TOKENS / wall_s, "host_ms": 1e3 * (wall_s - model_s) / num_steps}


def main(
    model: Annotated[Path, typer.Argument(help="A checkpoint.")],
    budget: Annotated[str, typer.Option(help="Of drafts; 'off' has none.")] = "off",
) -> None:
    """Print a JSON line for each number of requests and policy."""
    from vllm import LLM

    spiffy = None if budget == "off" else {"method": "spiffy", "budget": budget if budget == "auto" else int(budget)}
    llm: Any = LLM(
        str(model),
        dtype="float32",
        max_model_len=256,
        max_num_seqs=16,
        max_num_batched_tokens=8192,
        kv_cache_memory_bytes=256 << 20,
        distributed_executor_backend="uni",
        speculative_config=spiffy,
    )
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    spent_s = [0.0]
    runner.model.forward = _timed(runner.model.forward, spent_s)
    head = runner.model_state.denoiser.head
    type(head).__call__ = _timed(type(head).__call__, spent_s)
    for policy in ("static", "threshold"):
        for num_reqs in (1, 4, 16):
            found = measure(llm, num_reqs, policy, spent_s)
            print(json.dumps({"policy": policy, "requests": num_reqs} | {k: round(v, 2) for k, v in found.items()}))


if __name__ == "__main__":
    typer.run(main)
