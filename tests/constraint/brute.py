"""Constraints over a tiny vocabulary, and the texts that meet them, one after another, by Python's `re`."""

import random
import re
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np

from vllm_dllm.constraint.automaton import Automaton
from vllm_dllm.constraint.compile import TokenBytes, compile_tokens
from vllm_dllm.constraint.regex import build_table, parse_table

TEXTS = {0: b"a", 1: b"b", 2: b"ab", 3: b"ba", 5: b"aab", 6: b"b"}
MASK, END, OTHER_END, VOCAB = 4, 7, 8, 9
TOKENS = TokenBytes.of(TEXTS, VOCAB, [END, OTHER_END])


def automaton_of(regex: str, tokens: TokenBytes = TOKENS) -> Automaton:
    return compile_tokens(parse_table(build_table(regex)), tokens)


def random_regex(rng: random.Random, depth: int = 3) -> str:
    if depth == 0:
        return rng.choice(["a", "b", "ab", "[ab]", "ba"])
    kind = rng.randrange(4)
    part = random_regex(rng, depth - 1)
    if kind == 0:
        return f"(?:{part}){rng.choice(['*', '+', '?', '{2}', '{1,3}'])}"
    if kind == 1:
        return f"(?:{part}|{random_regex(rng, depth - 1)})"
    return part + random_regex(rng, depth - 1)


@dataclass(frozen=True)
class Brute:
    """All token sequences of a length that are an answer: a text that is complete by `limit`, then end tokens alone."""

    regex: str
    length: int
    limit: int

    @cached_property
    def answers(self) -> np.ndarray:
        found = []
        for size in range(self.limit + 1):
            texts = product(TEXTS, repeat=size)
            accepted = [text for text in texts if re.fullmatch(self.regex, "".join(TEXTS[t].decode() for t in text))]
            endings = list(product([END, OTHER_END], repeat=self.length - size)) if accepted else []
            found += [text + ending for text in accepted for ending in endings]
        return np.array(found, dtype=np.int64).reshape(-1, self.length)

    def that_have(self, canvas: np.ndarray) -> np.ndarray:
        """Answers with the known tokens of a canvas, which may be shorter."""
        own = self.answers[:, : len(canvas)]
        return own[((canvas == -1) | (own == canvas)).all(1)]

    def allowed(self, canvas: np.ndarray) -> np.ndarray:
        """[len(canvas), VOCAB] bool."""
        allowed = np.zeros((len(canvas), VOCAB), dtype=bool)
        for answer in self.that_have(canvas):
            allowed[np.arange(len(canvas)), answer] = True
        return allowed & (canvas == -1)[:, None]


def random_canvas(rng: random.Random, brute: Brute, length: int) -> np.ndarray:
    """Mostly of an answer, some of nothing in particular."""
    known = rng.choice(brute.answers)[:length].copy() if len(brute.answers) and rng.random() < 0.7 else None
    if known is None:
        known = np.array([rng.choice([*TEXTS, END, OTHER_END]) for _ in range(length)])
    masked = np.array([rng.random() < 0.6 for _ in range(length)])
    return np.where(masked, -1, known)
