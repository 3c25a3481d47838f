"""Requests that give a part of their answer."""

import dataclasses
import random

from tests.e2e.rig import Case
from vllm_dllm.state.edits import NO_EDITS


def with_given(cases: list[Case], block_length: int, seed: int, *, has_suffixes: bool = True) -> list[Case]:
    """Return the cases, all but every fourth with tokens given, or in front of a suffix; none with bad words.

    Some blocks are given whole, where blocks begin behind the prompt.
    """
    rng = random.Random(seed)
    made = []
    for i, case in enumerate(cases):
        case = dataclasses.replace(case, edits=dataclasses.replace(case.edits, bad_words=NO_EDITS.bad_words))
        given: list[int | None] = []
        while i % 4 and len(given) < case.max_tokens:
            share = rng.choice([0.0, 0.2, 0.6, 1.0, 1.0])
            given += [rng.randrange(7, 100) if rng.random() < share else None for _ in range(block_length)]
        given = given[: case.max_tokens]
        if has_suffixes and i % 4 == 3:
            given = [None] * case.max_tokens + [rng.randrange(7, 100) for _ in range(rng.choice([1, 5, 14]))]
            case = dataclasses.replace(case, steps=None)  # which are of other blocks in the reference
        made.append(dataclasses.replace(case, given=tuple(given)))
    return made
