"""Count what a step asks torch for outside of the model: on a GPU each is a launch or a copy, and host time.

    python -m benchmarks.launches

The small models decode on this machine's CPU; the numbers are those of any device, since the same code runs there. What
is asked before the forward, while a GPU has nothing to do, is told apart from what is asked behind it, while it runs.
"""

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from vllm import LLM, SamplingParams

from vllm_dllm.engine.measuring import start_engine
from vllm_dllm.measure.report import Row, Section, to_markdown
from vllm_dllm.measure.workload import EngineSpec, Workload

NOTHING = (
    *("alias", "as_strided", "chunk", "detach", "diagonal", "empty", "expand", "flatten", "lift_fresh", "movedim"),
    *("new_empty", "permute", "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind"),
    *("unflatten", "unsqueeze", "view", "_reshape_alias", "is_pinned"),
)
"""Ops that make a view or reserve memory, and launch nothing."""

BEFORE, BEHIND = "before the forward", "behind it"


class Counts(TorchDispatchMode):
    """Counts the ops within, by name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one op and run it."""
        name = str(func).split(".")[1]
        if name not in NOTHING:
            self.ops[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted(llm: LLM) -> Iterator[dict[str, list[Counter[str]]]]:
    """Count the ops of all steps of an engine in this process; yields those of each step, before and behind it."""
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    state, steps = runner.model_state, defaultdict[str, list[Counter[str]]](list)
    sampler = runner.sampler

    def wrap(call: Callable[..., Any], part: str, *, begins: bool) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with Counts() as counts:
                result = call(*args, **kwargs)
            if begins:
                steps[part].append(Counter())
            steps[part][-1] += counts.ops
            return result

        return wrapper

    state.preprocess_state = wrap(state.preprocess_state, BEFORE, begins=True)
    state.prepare_attn = wrap(state.prepare_attn, BEFORE, begins=False)
    runner.sampler = wrap(sampler, BEHIND, begins=True)
    for name in ("add_request", "apply_staged_writes", "take_rows", "penalties_state"):
        setattr(runner.sampler, name, getattr(sampler, name))
    try:
        yield steps
    finally:
        del state.preprocess_state, state.prepare_attn
        runner.sampler = sampler


@dataclass(frozen=True, slots=True)
class Case:
    """What is counted."""

    model: str  # of examples/
    block_length: int
    drafts: int
    temperature: float


CASES = [
    Case("tiny_llada", 32, 0, 0.0),
    Case("tiny_llada", 32, 10, 0.0),
    Case("tiny_llada", 32, 10, 0.7),
    Case("tiny_sdar", 4, 10, 0.0),
    Case("tiny_sdar", 4, 10, 0.7),
]


def count(case: Case) -> Row:
    """Decode a request; return the medians over its steps."""
    model = str(Path(__file__).parent.parent / "examples" / case.model / "checkpoint")
    prompts = (tuple(range(5, 25)),)
    workload = Workload(model, prompts, gen_length=64, block_length=case.block_length, concurrency=(1,))
    speculation = {"method": "spiffy", "budget": case.drafts} if case.drafts else None
    llm = start_engine(EngineSpec(workload, speculative_config=speculation, most_drafts=case.drafts))
    params = SamplingParams(temperature=case.temperature, max_tokens=64, seed=1, ignore_eos=True)
    with counted(llm) as steps:
        llm.generate([{"prompt_token_ids": list(prompts[0])}], params, use_tqdm=False)
    llm.llm_engine.engine_core.shutdown()
    medians = {part: statistics.median(ops.total() for ops in steps[part]) for part in (BEFORE, BEHIND)}
    return {"model": case.model, "drafts": case.drafts, "temperature": case.temperature, **medians}


if __name__ == "__main__":
    print(to_markdown([Section("torch ops per step outside of the model, median", [count(case) for case in CASES])]))
