"""Count what a step of an engine that may draft costs where it makes no drafts: torch ops, and calls of the host.

    python -m benchmarks.armed

Counts do not depend on what else the machine does. The armed engine's rule chooses as ever, but its choice is not
followed: no step has drafts.
"""

import statistics
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from vllm import SamplingParams

from benchmarks.launches import Counts
from vllm_dllm.engine.measuring import start_engine
from vllm_dllm.measure.report import Row, Section, to_markdown
from vllm_dllm.measure.workload import EngineSpec, Workload

GEN_LENGTH = 64
ROOT = str(Path(__file__).parent.parent)


def count(model: str, block_length: int, num_reqs: int, speculation: dict[str, Any] | None) -> dict[str, float]:
    """Return the medians over the steps, of an engine that has served before.

    Args:
        model: a checkpoint.
        block_length: of canvases.
        num_reqs: requests at once.
        speculation: as `speculative_config`; None: unarmed.
    """
    prompts = tuple(tuple(range(5 + i, 25 + i)) for i in range(num_reqs))
    workload = Workload(model, prompts, GEN_LENGTH, block_length, concurrency=(num_reqs,))
    llm = start_engine(EngineSpec(workload, speculative_config=speculation, most_drafts=10))
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    if (rule := scheduler.rule) is not None:
        choose = rule.choose
        rule.choose = lambda *args: 0 * choose(*args)
    _serve(llm, prompts)  # brings the curve that was measured
    ops: list[int] = []
    calls: list[Counter[str]] = []

    def step_ops() -> None:
        with Counts() as counts:
            llm.llm_engine.step()
        ops.append(counts.ops.total())

    def step_calls() -> None:
        counted: Counter[str] = Counter()

        def note(frame: Any, event: str, _: Any) -> None:
            if event == "call":
                counted["ours" if frame.f_code.co_filename.startswith(ROOT + "/vllm_dllm") else "others"] += 1

        sys.setprofile(note)
        try:
            llm.llm_engine.step()
        finally:
            sys.setprofile(None)
        calls.append(counted)

    _serve(llm, prompts, step_ops)
    _serve(llm, prompts, step_calls)
    llm.llm_engine.engine_core.shutdown()
    return {
        "torch ops": statistics.median(ops),
        "Python calls": statistics.median(each.total() for each in calls),
        "in the mean": statistics.mean(each.total() for each in calls),
        "of these ours": statistics.mean(each["ours"] for each in calls),
    }


def _serve(llm: Any, prompts: tuple[tuple[int, ...], ...], step: Any = None) -> None:
    params = SamplingParams(temperature=0, max_tokens=GEN_LENGTH, ignore_eos=True)
    for number, prompt in enumerate(prompts):
        llm.llm_engine.add_request(str(number), {"prompt_token_ids": list(prompt)}, params)
    while llm.llm_engine.has_unfinished_requests():
        (step or llm.llm_engine.step)()


def main() -> None:
    """Print the table."""
    rows: list[Row] = []
    for name, block_length in (("tiny_llada", 32), ("tiny_sdar", 8)):
        model = str(Path(ROOT) / "examples" / name / "checkpoint")
        for num_reqs in (1, 4):
            for kind, speculation in (("off", None), ("armed", {"method": "spiffy", "budget": "auto"})):
                found = count(model, block_length, num_reqs, speculation)
                rows.append({"model": name, "requests": num_reqs, "engine": kind, **found})
    print(to_markdown([Section("of a step without drafts, medians of the steps", rows)]))


if __name__ == "__main__":
    main()
