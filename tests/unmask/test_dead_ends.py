"""What is known of positions that bad words leave nothing, beside all canvases of a few tokens."""

import itertools
import math
import random

import torch

from vllm_dllm.unmask.dead_ends import Word, dead_end
from vllm_dllm.unmask.edits import BadWords

MASK, AROUND = 9, 2


def is_barred(before: Word, behind: Word, token: int, words: list[Word]) -> bool:
    """Whether the decoder bars a token between known ones; words have up to `AROUND + 1` tokens."""
    length = AROUND + 1
    padding = (MASK,) * AROUND
    line = (*(*padding, *before)[-AROUND:], MASK, *(*behind, *padding)[:AROUND])
    padded = torch.tensor([[[*word, *[-1] * (length - len(word))] for word in words]])
    return token in BadWords(padded, torch.tensor([line]), MASK).barred()[0, 0].tolist()


def has_any(tokens: Word, words: list[Word]) -> bool:
    return any(tokens[i : i + len(word)] == word for word in words for i in range(len(tokens)))


def contexts(alphabet: set[int], room: int) -> list[Word]:
    return [some for length in range(room + 1) for some in itertools.product(sorted(alphabet), repeat=length)]


def test_it_is_found_where_the_decoder_has_one() -> None:
    """Of tokens 0 to 3 a position may have some, and those before and behind it others."""
    outcomes = []
    for number in range(300):
        rng = random.Random(number)
        tokens = range(rng.randint(2, 4))
        behind = {*rng.sample(tokens, rng.randint(1, len(tokens)))}
        before = {*rng.sample(sorted(behind), rng.randint(1, len(behind)))}
        words = [tuple(rng.choices(tokens, k=rng.randint(2, 3))) for _ in range(rng.randint(1, 9))]
        room = rng.choice([0, 1, math.inf])
        expected = [
            (left, right)
            for left in contexts(before, int(min(room, AROUND)))
            for right in contexts(behind, AROUND)
            if not has_any(left, words) and not has_any(right, words)
            if all(is_barred(left, right, token, words) for token in before)
        ]
        found = dead_end(before, before, behind, words, room)
        assert (found is not None) == bool(expected), (before, behind, words, room)
        assert found is None or found in expected
        outcomes.append(found is not None)
    assert 30 < sum(outcomes) < 270


def test_both_tokens_of_a_word_are_barred_between_them() -> None:
    two, three = {5, 6}, {5, 6, 7}
    assert dead_end(two, two, two, [(5, 6)]) == ((5,), (6,))
    assert dead_end(two, two, two, [(5, 6)], room=0) is None
    assert dead_end(two, two, two, [(5, 5), (6, 6)]) in [((5,), (6,)), ((6,), (5,))]
    assert dead_end(three, three, three, [(5, 6), (6, 5)]) is None
    assert dead_end({5}, {5}, {5}, [(5, 7)]) is None
    assert dead_end(set(), set(), {1}, []) == ((), ())
