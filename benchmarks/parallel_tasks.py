"""Synthetic tasks whose answers' tokens depend on one another, after the waiting lines and puzzles of ParallelBench
(arXiv:2510.04767): easy one token at a time, hard for a decoder that writes tokens together without seeing each other.

    python -m benchmarks.parallel_tasks --count 20 > tasks.jsonl

The prompts are ours. Each line has `question`, and `task` and `given`, by which `right` judges a reply; so the file
is one for `vllm-dllm bench decode --prompts` too. In `copy`, `reverse`, `sort` and the like one answer is right; in
`shuffle`, `replace` and `latin` many are, and tokens of several of them mixed are wrong.
"""

import argparse
import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

_NAMES = """
Alice Bruno Clara David Elena Felix Grace Henry Irene Jonas Karen Louis Maria Nadia Oscar Paula Quinn Ralph Sofia Tomas
"""
NAMES = _NAMES.split()
NEW_NAME = "Zoe"
SYMBOLS = "ABCD"


@dataclass(frozen=True, slots=True)
class Task:
    """A kind of question.

    Attributes:
        text: of the question, with `{line}` for the names in line and `{size}` for how many.
        is_right: whether a list of names or rows answers a question about the given names.
    """

    text: str
    is_right: Callable[[Sequence[str], Sequence[str]], bool]


def _is_latin(found: Sequence[str], given: Sequence[str]) -> bool:
    lines = [*found, *("".join(column) for column in zip(*found, strict=False))]
    wanted = sorted(SYMBOLS[: len(given)])
    return len(lines) == 2 * len(given) and all(sorted(line) == wanted for line in lines)


def _is_shuffled(found: Sequence[str], given: Sequence[str]) -> bool:
    return sorted(found) == sorted(given) and [*found] != [*given]


def _is_replaced(found: Sequence[str], given: Sequence[str]) -> bool:
    if len(found) != len(given):
        return False
    changed = [new for old, new in zip(given, found, strict=True) if old != new]
    return changed == [NEW_NAME]


_LINE = "These people wait in line: {line}. "
_END = " Write the names alone, with commas between them."

TASKS: Mapping[str, Task] = {
    "copy": Task(_LINE + "Repeat the line." + _END, lambda found, given: [*found] == [*given]),
    "reverse": Task(_LINE + "Reverse the line." + _END, lambda found, given: [*found] == [*given][::-1]),
    "sort": Task(_LINE + "Sort the line by the alphabet." + _END, lambda found, given: [*found] == sorted(given)),
    "leave": Task(_LINE + "The first one leaves." + _END, lambda found, given: [*found] == [*given][1:]),
    "join": Task(_LINE + f"{NEW_NAME} joins at the end." + _END, lambda found, given: [*found] == [*given, NEW_NAME]),
    "shuffle": Task(_LINE + "Put them into any other order, each of them once." + _END, _is_shuffled),
    "replace": Task(_LINE + f"Replace any one of them by {NEW_NAME}, and leave the others." + _END, _is_replaced),
    "latin": Task(
        "Fill a square of {size} rows and {size} columns with the letters {symbols}, so that each row and each column "
        "has each letter once. Write the rows alone, letters without spaces, with commas between the rows.",
        _is_latin,
    ),
}
MOST_ROWS = len(SYMBOLS)


@dataclass(frozen=True, slots=True)
class Question:
    """A question, and what judges its replies."""

    task: str
    question: str
    given: tuple[str, ...]  # names in line; of `latin` as many as it has rows


def draw(task: str, size: int, rng: random.Random) -> Question:
    """Draw a question.

    Args:
        task: a name of `TASKS`.
        size: names in line, 2 to 20; `latin` has at most `MOST_ROWS` rows.
        rng: draws.
    """
    given = tuple(rng.sample(NAMES, min(size, MOST_ROWS) if task == "latin" else size))
    text = TASKS[task].text.format(line=", ".join(given), size=len(given), symbols=" ".join(SYMBOLS[: len(given)]))
    return Question(task, text, given)


def right(line: Mapping[str, object], reply: str) -> bool:
    """Judge a reply to a line of a file of these tasks; what is behind its first line does not count."""
    given = line["given"]
    assert isinstance(given, list | tuple), "as it was drawn"
    found = re.findall(r"\w+", (reply.strip().splitlines() or [""])[0])
    return TASKS[str(line["task"])].is_right(found, given)


def main() -> None:
    """Print questions of all tasks."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--count", type=int, default=20, help="of each task")
    parser.add_argument("--size", type=int, default=4, help="names in line, 2 to 20")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if not 2 <= options.size <= len(NAMES):
        parser.error(f"--size is {options.size}, allowed are 2 to {len(NAMES)}")
    rng = random.Random(options.seed)
    for task in TASKS:
        for _ in range(options.count):
            its = draw(task, options.size, rng)
            print(json.dumps({"task": its.task, "question": its.question, "given": its.given}))


if __name__ == "__main__":
    main()
