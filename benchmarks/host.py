"""Two checkouts in turn: tokens per second, and what the host does in a step besides the model and its LM head.

    python -m benchmarks.host CHECKPOINT --before OTHER_CHECKOUT --budget auto

Each checkout has its engine on the CPU in a process of its own, with its own environment (`.venv`, as `make setup`
leaves it), and both are asked in turn, so that what else the machine does meets both alike. It uses nothing of them but
`LLM` and the runner's model and LM head, so the other one may be old.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

PROMPT_LEN, NUM_TOKENS = 40, 64
NUM_REQS = (1, 4, 16)
ROOT = Path(__file__).parent.parent


def _timed(function: Callable[..., Any], spent_s: list[float]) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent_s[0] += time.perf_counter() - begin

    return timed


def _start(model: str, budget: str, spent_s: list[float]) -> Any:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}  # it is timed in this process
    from vllm import LLM

    spiffy = None if budget == "off" else {"method": "spiffy", "budget": budget if budget == "auto" else int(budget)}
    llm = LLM(
        model,
        dtype="float32",
        max_model_len=256,
        max_num_seqs=16,
        max_num_batched_tokens=8192,
        kv_cache_memory_bytes=256 << 20,
        distributed_executor_backend="uni",
        speculative_config=spiffy,
    )
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    runner.model.forward = _timed(runner.model.forward, spent_s)
    head = runner.model_state.denoiser.head
    type(head).__call__ = _timed(type(head).__call__, spent_s)
    return llm.llm_engine


def _measure(engine: Any, num_reqs: int, policy: str, spent_s: list[float]) -> dict[str, float]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, extra_args={"dllm_policy": policy})
    spent_s[0], num_steps, begin = 0.0, 0, time.perf_counter()
    for i in range(num_reqs):
        engine.add_request(str(i), {"prompt_token_ids": list(range(5 + i, 5 + i + PROMPT_LEN))}, params)
    while engine.has_unfinished_requests():
        engine.step()
        num_steps += 1
    wall_s = time.perf_counter() - begin
    return {"tokens/s": num_reqs * NUM_TOKENS / wall_s, "host ms": 1e3 * (wall_s - spent_s[0]) / num_steps}


def serve_rounds(model: str, budget: str, policies: list[str]) -> None:
    """Answer each line of stdin with a round's figures as JSON; engines write to stderr alone."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    spent_s = [0.0]
    engine = _start(model, budget, spent_s)
    scenes = [(policy, num_reqs) for policy in policies for num_reqs in NUM_REQS]
    for policy, num_reqs in scenes * 2:  # warms up
        _measure(engine, num_reqs, policy, spent_s)
    print("ready", file=answers, flush=True)
    for _ in sys.stdin:
        figures = {f"{policy}, {n}": _measure(engine, n, policy, spent_s) for policy, n in scenes}
        peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps(figures | {"peak": {"MiB": peak_mib}}), file=answers, flush=True)


def _open(root: Path, model: Path, budget: str, policies: list[str]) -> subprocess.Popen[str]:
    command = [root / ".venv/bin/python", __file__, "--child", model.resolve(), budget, *policies]
    return subprocess.Popen(list(map(str, command)), cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _answer(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    line = child.stdout.readline().strip()
    if not line:
        raise RuntimeError("an engine ended; its own words are above")
    return line


def _ask(child: subprocess.Popen[str]) -> dict[str, dict[str, float]]:
    assert child.stdin is not None
    child.stdin.write("\n")
    child.stdin.flush()
    answer: dict[str, dict[str, float]] = json.loads(_answer(child))
    return answer


def main(
    model: Annotated[Path, typer.Argument(help="A checkpoint.")],
    before: Annotated[Path, typer.Option(help="Another checkout, set up.")],
    budget: Annotated[str, typer.Option(help="Of drafts; 'off' has none.")] = "off",
    policies: Annotated[str, typer.Option(help="With commas between.")] = "static,threshold",
    rounds: Annotated[int, typer.Option(min=1, help="Each asks both, in turn the one or the other first.")] = 7,
) -> None:
    """Print medians before and after, and the median, least and greatest ratio of rounds."""
    from vllm_dllm.measure.report import Spread  # not at the top: the other checkout may not have it

    children = [_open(root.resolve(), model, budget, policies.split(",")) for root in (before, ROOT)]
    for child in children:
        _answer(child)
    found: list[list[dict[str, dict[str, float]]]] = [[], []]
    for i in range(rounds):
        for side in (i % 2, 1 - i % 2):
            found[side].append(_ask(children[side]))
    print("| | | before | after | after / before |\n|---|---|---|---|---|")
    for scene, units in found[0][0].items():
        for unit in units:
            old, new = ([figures[scene][unit] for figures in side] for side in found)
            spread = Spread.of([b / a for a, b in zip(old, new, strict=True)])
            print(f"| {scene} | {unit} | {statistics.median(old):.2f} | {statistics.median(new):.2f} | {spread} |")
    for child in children:
        child.communicate()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        serve_rounds(sys.argv[2], sys.argv[3], sys.argv[4:])
    else:
        typer.run(main)
