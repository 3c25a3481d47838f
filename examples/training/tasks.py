"""The synthetic tasks of the tiny LLaDA: short questions with one right answer each.

A question belongs to the held-out set when a checksum of its text says so, hence training and evaluation never share
one, whatever the seeds.
"""

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass

_WORDS = """
ant bat bee cat cow dog elk emu fox gnu hen jay owl pig ram yak red tan blue gold gray pink teal lime
ann bob dan eve ida max sam tim
"""
WORDS = _WORDS.split()
WORD_KEYS = ("name", "pet", "color")
NUMBER_KEYS = ("age", "size", "room")
HELD_OUT_SHARE = 10  # one question in so many


@dataclass(frozen=True, slots=True)
class Example:
    """A question and the one answer that counts as right."""

    task: str
    question: str
    answer: str


def is_held_out(question: str) -> bool:
    """Say whether a question is kept for evaluation."""
    return zlib.crc32(question.encode()) % HELD_OUT_SHARE == 0


def _two_digits(rng: random.Random) -> int:
    return rng.randrange(10, 100)


def _add(rng: random.Random) -> tuple[str, str]:
    a, b = _two_digits(rng), _two_digits(rng)
    return f"{a} + {b} = ?", str(a + b)


def _max(rng: random.Random) -> tuple[str, str]:
    numbers = [_two_digits(rng) for _ in range(3)]
    return "Largest of " + " ".join(map(str, numbers)), str(max(numbers))


def _sort(rng: random.Random) -> tuple[str, str]:
    digits = rng.sample("0123456789", rng.randint(3, 5))
    return "Sort " + " ".join(digits), " ".join(sorted(digits))


def _reverse(rng: random.Random) -> tuple[str, str]:
    words = [rng.choice(WORDS) for _ in range(rng.randint(2, 5))]
    return "Reverse " + " ".join(words), " ".join(reversed(words))


def _json(rng: random.Random) -> tuple[str, str]:
    keys = [rng.choice(WORD_KEYS), rng.choice(NUMBER_KEYS)]
    rng.shuffle(keys)
    pairs = [(key, rng.choice(WORDS) if key in WORD_KEYS else str(_two_digits(rng))) for key in keys]
    fields = [f'"{key}": "{value}"' if key in WORD_KEYS else f'"{key}": {value}' for key, value in pairs]
    return "JSON " + ", ".join(f"{key} {value}" for key, value in pairs), "{" + ", ".join(fields) + "}"


def _count(rng: random.Random) -> tuple[str, str]:
    first, num = rng.randrange(10, 89), rng.randint(2, 12)
    return f"Count {num} from {first}", " ".join(str(number) for number in range(first, first + num))


TASKS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "add": _add,
    "max": _max,
    "sort": _sort,
    "reverse": _reverse,
    "json": _json,
    "count": _count,
}


def draw(task: str, rng: random.Random, *, held_out: bool) -> Example:
    """Draw an example of a task from the held-out set, or from the rest."""
    while True:
        question, answer = TASKS[task](rng)
        if is_held_out(question) == held_out:
            return Example(task, question, answer)
