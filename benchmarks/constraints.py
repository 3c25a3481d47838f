"""What structured output costs the host: compiling a constraint, and the masks and decisions of a step.

    python -m benchmarks.constraints

A vocabulary of 126,000 made-up tokens, a block of 32 positions with as many masked as not, with and without 5 drafts.
"""

import json
import random
import statistics
import time
from collections.abc import Callable

import numpy as np

from vllm_dllm.constraint.answer import Answer
from vllm_dllm.constraint.automaton import Automaton
from vllm_dllm.constraint.compile import TokenBytes, compile_tokens
from vllm_dllm.constraint.reach import MASKED
from vllm_dllm.constraint.regex import byte_automaton
from vllm_dllm.constraint.schema import schema_regex

VOCAB_SIZE, BLOCK_LENGTH, ANSWER_LENGTH, REPEATS = 126_464, 32, 512, 20


def vocabulary() -> TokenBytes:
    """Make tokens of letters, digits and JSON's signs, of 1 to 12 characters; all single bytes are among them."""
    rng = random.Random(0)
    letters = "etaoinshrdlu" * 3 + "cmfwypvbgkjqxz" + "0123456789" + '{}[]:,". _-'
    texts = {bytes([byte]) for byte in range(256)}
    while len(texts) < VOCAB_SIZE - 64:
        texts.add((" " * rng.randrange(2) + "".join(rng.choices(letters, k=rng.randint(2, 12)))).encode())
    return TokenBytes.of(dict(enumerate(sorted(texts))), VOCAB_SIZE, [VOCAB_SIZE - 1])


def regex_of(num_states: int) -> str:
    """Write a schema whose automaton has about so many states."""
    kinds = [{"type": "string"}, {"type": "integer"}, {"type": "boolean"}, {"enum": ["small", "middle", "large"]}]
    if num_states <= 10:
        return "yes|no|maybe"
    names = [f"field_{number}" for number in range(num_states // 26)]
    properties = {name: kinds[number % len(kinds)] for number, name in enumerate(names)}
    return schema_regex({"type": "object", "properties": properties, "required": names})


def written(automaton: Automaton, rng: random.Random) -> list[int]:
    """Write an answer: shortest ways with detours."""
    some = [np.flatnonzero(automaton.class_of == each) for each in range(automaton.step.shape[1])]
    state = 0
    tokens: list[int] = []
    while len(tokens) < ANSWER_LENGTH:
        left = ANSWER_LENGTH - len(tokens) - 1
        after = automaton.step[state]
        ways = np.flatnonzero((automaton.distance[after] <= left) & [len(ids) > 0 for ids in some])
        token_class = int(rng.choice(ways.tolist()))
        tokens.append(int(rng.choice(some[token_class].tolist())))
        state = int(after[token_class])
    return tokens


def milliseconds(call: Callable[[], object]) -> float:
    """Return the median time of a call."""
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(times)


def expand(automaton: Automaton, sets: np.ndarray) -> None:
    """Make the bits of all sets anew."""
    automaton._kept.clear()
    for each in sets:
        automaton.bits(each)


def measured(num_states: int, tokens: TokenBytes, rng: random.Random) -> dict[str, float]:
    """Compile a constraint and take its steps."""
    begin = time.perf_counter()
    over_bytes = byte_automaton(regex_of(num_states))
    built = time.perf_counter()
    automaton = compile_tokens(over_bytes, tokens)
    row = {
        "states": automaton.num_states,
        "kinds of tokens": automaton.step.shape[1],
        "expression s": round(built - begin, 2),
        "tokens s": round(time.perf_counter() - built, 2),
        "sent KB": len(automaton.to_bytes()) // 1000,
    }
    constraint = Answer(automaton, 0, ANSWER_LENGTH, ANSWER_LENGTH, 0, BLOCK_LENGTH).constraint()
    block = np.array(written(automaton, rng)[:BLOCK_LENGTH], dtype=np.int64)
    masked = rng.sample(range(BLOCK_LENGTH), BLOCK_LENGTH // 2)
    for num_nodes in (1, 6):
        canvas = np.stack([block] * num_nodes)
        canvas[:, masked] = MASKED
        row[f"reach ms, {num_nodes} canvases"] = round(milliseconds(lambda: constraint.allowed(canvas)), 2)  # noqa: B023
        allowed = constraint.allowed(canvas)
        sets = np.unique(allowed[allowed.any(2)], axis=0)
        row[f"bits ms, {num_nodes} canvases"] = round(milliseconds(lambda: expand(automaton, sets)), 2)  # noqa: B023
    first, wanted = canvas[0], [int(block[place]) for place in masked]
    row["decide ms"] = round(milliseconds(lambda: constraint.keep(first, masked, wanted)), 2)
    return row


def main() -> None:
    """Print a row for each size."""
    tokens, rng = vocabulary(), random.Random(1)
    for num_states in (10, 100, 1000):
        print(json.dumps(measured(num_states, tokens, rng)))


if __name__ == "__main__":
    main()
