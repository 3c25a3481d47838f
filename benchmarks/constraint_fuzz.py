"""Ask an engine for thousands of generated answers under generated constraints, and check each without our automata.

Constraints are JSON schemas, regular expressions, choices and any object; requests have every policy, any length and
edits of their logits, and free ones are among them. Each request is sent twice, with drafts and without, at random
places of a batch of others; now and then all that run are preempted, and some are aborted. An answer has to meet its
constraint by `jsonschema`, `re` and `==`, and to be the same both times. The exit status is 1 where one does not:

    python -m benchmarks.constraint_fuzz --model CHECKPOINT --requests 1000 --seed 1

What a request comes to depends on the seed, the sizes below, and its number alone; `--only NUMBER` sends one alone.
"""

import argparse
import dataclasses
import faulthandler
import json
import math
import os
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.fuzz.asked import draw_asked
from benchmarks.fuzz.requests import Drawn, Shape, check_pins, draw_request, needed_tokens, whole_ids

FREE_SHARE = 0.12
REQUESTS_EACH = 8
"""With one constraint: to compile it takes as long as to decode some."""
ROUNDING = 1e-3
"""Of log-probabilities in float32, relative where they are large: a batch of another shape adds in another order."""
MAX_STEPS_IDLE = 2000
"""Without an answer: more than the longest has steps."""


@dataclass
class Fuzz:
    """What a run counts.

    Attributes:
        outcomes: of requests, by what they asked for.
        refusals: messages, numbers left out.
        faults: what went wrong.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def fault(self, kind: str, drawn: Drawn, number: int, what: str) -> None:
        """Count and keep a fault."""
        self.outcomes[kind] += 1
        asked = drawn.asked and drawn.asked.params
        sent = {"asked": asked, "prompt": drawn.prompt, **drawn.sampling, **drawn.options}
        self.faults.append(f"{kind}: request {number}, {json.dumps(sent)}: {what}")


def draw(seed: int, number: int, shape: Shape, prompts: Sequence[list[int]]) -> Drawn:
    """Draw a request of a run; some in a row have the same constraint."""
    rng = random.Random(f"{seed}/{number}")
    asked = draw_asked(random.Random(f"{seed}/constraint {number // REQUESTS_EACH}"))
    return draw_request(rng, shape, None if rng.random() < FREE_SHARE else asked, prompts)


def params_of(drawn: Drawn, *, has_drafts: bool) -> Any:
    """Return vLLM's parameters of a request."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    options = drawn.options if has_drafts else {**drawn.options, "dllm_speculation": False}
    if not has_drafts:
        options.pop("dllm_budget", None)
    asked = drawn.asked and StructuredOutputsParams(**drawn.asked.params)
    return SamplingParams(**drawn.sampling, extra_args=options, structured_outputs=asked)


class Feeder:
    """Keeps requests in flight in an engine of this process, preempts and aborts."""

    def __init__(self, llm: Any, seed: int, in_flight: int) -> None:
        self._engine, self._rng, self._in_flight = llm.llm_engine, random.Random(seed), in_flight
        self.aborted: set[str] = set()
        self.num_preempted = 0

    def answers(self, requests: Iterator[tuple[str, Drawn, Any]]) -> Iterator[tuple[str, Any]]:
        """Yield the outcome of each request by its name: a vLLM output, or the error that refused it.

        Raises: RuntimeError where nothing comes out any more.
        """
        in_flight: set[str] = set()
        idle, is_more = 0, True
        while is_more or in_flight:
            while is_more and len(in_flight) < self._in_flight:
                name, drawn, params = next(requests, ("", None, None))
                is_more = drawn is not None
                refusal = self._add(name, drawn, params) if drawn is not None else None
                if refusal is not None:
                    yield name, refusal
                elif drawn is not None:
                    in_flight.add(name)
            outputs = [output for output in self._engine.step() if output.finished]
            idle = 0 if outputs or not in_flight else idle + 1
            if idle > MAX_STEPS_IDLE:
                raise RuntimeError(f"hang: no answer within {idle} steps of {sorted(in_flight)}")
            for output in outputs:
                in_flight.discard(output.request_id)
                yield output.request_id, output
            self._interfere(in_flight)

    def _add(self, name: str, drawn: Drawn, params: Any) -> ValueError | None:
        try:
            self._engine.add_request(name, {"prompt_token_ids": drawn.prompt}, params)
        except ValueError as error:
            return error
        return None

    def _interfere(self, in_flight: set[str]) -> None:
        if self._rng.random() < 0.005:
            self.num_preempted += len(self._engine.engine_core.engine_core.scheduler.running)
            if not self._engine.reset_prefix_cache(reset_running_requests=True):
                raise RuntimeError("nobody was preempted")
        victims = sorted(name for name in in_flight if name.startswith("abort"))
        if victims and self._rng.random() < 0.2:
            name = self._rng.choice(victims)
            self._engine.abort_request([name])
            self.aborted.add(name)
            in_flight.discard(name)


def requests_of(
    numbers: Sequence[int], drawn: Sequence[Drawn], rng: random.Random, until_s: float = math.inf
) -> Iterator[tuple[str, Drawn, Any]]:
    """Yield each request with drafts and without, a few places apart, and some that will be aborted.

    Args:
        numbers, drawn: of the requests.
        rng: orders them.
        until_s: by `time.monotonic`; those that have not been yielded then are left out.
    """
    window: list[tuple[str, Drawn, Any]] = []
    for number, each in zip(numbers, drawn, strict=True):
        if time.monotonic() > until_s:
            break
        for kind in ("on", "off", *(["abort"] if rng.random() < 0.05 else [])):
            window.append((f"{kind} {number}", each, params_of(each, has_drafts=kind != "off")))
        while len(window) > 3 * REQUESTS_EACH:
            yield window.pop(rng.randrange(len(window)))
    rng.shuffle(window)
    yield from window


def fitted(drawn: Drawn, refusal: str) -> Drawn | None:
    """Return a request again with just as many tokens as its refusal says are needed; None: it says nothing of it."""
    needed = needed_tokens(refusal)
    if needed is None:
        return None
    sampling = {name: value for name, value in drawn.sampling.items() if name != "min_tokens"}
    options = {name: value for name, value in drawn.options.items() if name != "dllm_steps"}
    return dataclasses.replace(drawn, sampling={**sampling, "max_tokens": needed}, options=options)


def check_logprobs(drawn: Drawn, *outputs: Any) -> None:
    """Check that log-probabilities are some, and the same but for rounding. Raises: ValueError."""
    if "logprobs" not in drawn.sampling:
        return
    of_each = [
        [place[token].logprob for place, token in zip(output.logprobs, output.token_ids, strict=True)]
        for output in outputs
    ]
    for own in zip(*of_each, strict=True):
        if not (min(own) > -1e4 and max(own) <= 1e-6 and max(own) - min(own) <= ROUNDING * (1 - min(own))):
            raise ValueError(f"log-probabilities {own} of a token with drafts and without, in {of_each}")


def judge(fuzz: Fuzz, number: int, drawn: Drawn, outcomes: dict[str, Any]) -> None:
    """Check a request's outcomes with drafts and without."""
    kind = drawn.asked.kind if drawn.asked else "free"
    on, off = outcomes["on"], outcomes["off"]
    if isinstance(on, ValueError) or isinstance(off, ValueError):
        if str(on) != str(off):
            fuzz.fault("unequal", drawn, number, f"{on!r} with drafts, {off!r} without")
        fuzz.outcomes[f"{kind} refused"] += 1
        fuzz.refusals[re.sub(r"'.*?'|\d+|\(.*?\)", "_", str(on))[:140]] += 1
        return
    (with_drafts,), (without,) = on.outputs, off.outputs
    if list(with_drafts.token_ids) != list(without.token_ids):
        fuzz.fault("unequal", drawn, number, f"{with_drafts.token_ids} with drafts, {without.token_ids} without")
        return
    try:
        check_logprobs(drawn, with_drafts, without)
        check_pins(drawn.options, with_drafts.token_ids)
        if drawn.asked is not None:
            drawn.asked.check(with_drafts.text)
    except ValueError as error:
        fuzz.fault("violated", drawn, number, f"{error}, tokens {with_drafts.token_ids}")
        return
    fuzz.outcomes[kind if "dllm_canvas" not in drawn.options else "pinned"] += 1
    fuzz.outcomes["drafts that came true"] += on.kv_transfer_params["dllm"]["accepted"]


def run(
    llm: Any,
    shape: Shape,
    seed: int,
    numbers: Sequence[int],
    in_flight: int,
    prompts: Sequence[list[int]] = (),
    until_s: float = math.inf,
) -> Fuzz:
    """Send the requests of some numbers, and those that were too short for their answer again."""
    fuzz, rng, feeder = Fuzz(), random.Random(seed), Feeder(llm, seed, in_flight)
    drawn = {number: draw(seed, number, shape, prompts) for number in numbers}
    for is_last in (False, True):
        outcomes: dict[int, dict[str, Any]] = {}
        short: dict[int, Drawn] = {}
        requests = requests_of([*drawn], [*drawn.values()], rng, until_s)
        for name, outcome in feeder.answers(requests):
            kind, number = name.split()
            outcomes.setdefault(int(number), {})[kind] = outcome
            of_both = outcomes[int(number)]
            if not {"on", "off"} <= of_both.keys() or kind == "abort":
                continue
            again = None if is_last else fitted(drawn[int(number)], str(of_both["on"]))
            if again is not None and again.sampling["max_tokens"] <= 2 * shape.max_tokens:
                short[int(number)] = again
            else:
                judge(fuzz, int(number), drawn[int(number)], of_both)
        drawn = short
    fuzz.outcomes["preempted"], fuzz.outcomes["aborted"] = feeder.num_preempted, len(feeder.aborted)
    return fuzz


def start(arguments: argparse.Namespace) -> Any:
    """Start an engine in this process, which checks its state at each step."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_DLLM_CHECK": "1"}
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from vllm import LLM

    settings = json.loads(arguments.settings)
    more: dict[str, Any] = json.loads(arguments.engine)
    drafts = None if arguments.drafts == "none" else {"method": "spiffy", "budget": int(arguments.drafts)}
    values: dict[str, Any] = {
        "model": str(arguments.model),
        "dtype": "float32",
        "max_model_len": 256,
        "max_num_seqs": arguments.in_flight,
        "block_size": 16,
        "kv_cache_memory_bytes": 128 << 20,
        "distributed_executor_backend": "uni",
        "speculative_config": drafts,
        "additional_config": {"dllm": settings},
    }
    return LLM(**(values | more))


def shape_of(llm: Any) -> Shape:
    """Return what requests to an engine have to fit."""
    from vllm_dllm.engine.configs import settings_of

    config, tokenizer = llm.llm_engine.vllm_config, llm.get_tokenizer()
    return Shape(config.model_config.get_vocab_size(), whole_ids(tokenizer), settings_of(config).block_length)


def read_questions(tokenizer: Any, path: Path) -> list[list[int]]:
    """Return the token ids of some questions, as chats have them."""
    texts = [json.loads(line)["question"] for line in path.read_text().splitlines()[:200]]
    chats = [[{"role": "user", "content": text}] for text in texts]
    return [tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for chat in chats]


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a checkpoint")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="no further requests behind so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one request")
    parser.add_argument("--in-flight", type=int, default=16)
    parser.add_argument("--drafts", default="4", help="of a step; none")
    parser.add_argument("--settings", default="{}", help="additional_config.dllm as JSON")
    parser.add_argument("--engine", default="{}", help="further engine arguments as JSON")
    parser.add_argument("--questions", type=Path, help="lines of JSON with a question, which half of the requests ask")
    return parser.parse_args()


def main() -> None:
    """Run and judge."""
    faulthandler.enable()
    arguments = parse_arguments()
    llm = start(arguments)
    prompts = [] if arguments.questions is None else read_questions(llm.get_tokenizer(), arguments.questions)
    numbers = range(arguments.requests) if arguments.only is None else [arguments.only]
    until_s = time.monotonic() + 60 * arguments.minutes
    fuzz = run(llm, shape_of(llm), arguments.seed, numbers, arguments.in_flight, prompts, until_s)
    for message, count in fuzz.refusals.most_common(12):
        print(f"refused, {count} times: {message}")
    for fault in fuzz.faults[:10]:
        print(fault)
    print(json.dumps({"passed": not fuzz.faults, "outcomes": dict(sorted(fuzz.outcomes.items()))}))
    llm.llm_engine.engine_core.shutdown()
    sys.exit(bool(fuzz.faults))


if __name__ == "__main__":
    main()
