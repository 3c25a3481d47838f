"""Requests that edit their logits."""

import dataclasses
import itertools
import random

from tests.e2e.rig import Case
from vllm_dllm.state.edits import LogitEdits


def with_edits(cases: list[Case], seed: int) -> list[Case]:
    """Return the cases, every other one with edits of its logits."""
    rng = random.Random(seed)
    edited = []
    for case in cases[::2]:
        free = rng.sample(range(100, 200), 40)
        words = [tuple(rng.choices([*range(7, 100), *free[:2]], k=rng.choice([1, 2, 2, 3]))) for _ in range(300)]
        edits = LogitEdits(
            allowed_ids=tuple(rng.choice([(), (1, 6, *range(7, 60), *free)])),
            bias=tuple((token, rng.choice([-100.0, 3.0, 8.0])) for token in rng.sample([1, 6, *free], 3)),
            min_tokens=rng.choice([0, case.max_tokens // 2, case.max_tokens]),
            repetition=rng.choice([1.0, 1.25, 4.0]),
            frequency=rng.choice([0.0, 0.5, 2.0]),
            presence=rng.choice([0.0, 1.0, -0.5]),
            bad_words=tuple(words),
            min_p=rng.choice([0.0, 0.05, 0.3]) * (case.policy != "credit"),
        )
        edited.append(dataclasses.replace(case, edits=edits))
    return [case for pair in itertools.zip_longest(edited, cases[1::2]) for case in pair if case]
