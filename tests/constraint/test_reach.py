"""A token is allowed at a position if and only if some answer has it there: against all those of tiny vocabularies."""

import functools
import random

import numpy as np
import pytest

from tests.constraint.brute import END, MASK, OTHER_END, TEXTS, VOCAB, Brute, automaton_of, random_canvas, random_regex
from vllm_dllm.constraint.answer import Answer
from vllm_dllm.constraint.automaton import Automaton
from vllm_dllm.constraint.reach import BlockConstraint
from vllm_dllm.constraint.regex import ConstraintError
from vllm_dllm.state.pins import Pins

NUM_REGEXES, CANVASES = 200, 50
"""10,000 canvases in all; a part of them in each test below."""
LENGTH = 5


def as_ids(automaton: Automaton, allowed: np.ndarray) -> np.ndarray:
    """[..., num_classes] bool of classes -> [..., VOCAB] bool of ids, by the bits that go to the head."""
    flat = allowed.reshape(-1, allowed.shape[-1])
    words = np.stack([automaton.bits(each) for each in flat]).view(np.uint32)
    bits = words[:, :, None] >> np.arange(32, dtype=np.uint32) & 1
    return bits.reshape(len(flat), -1)[:, :VOCAB].astype(bool).reshape(*allowed.shape[:-1], VOCAB)


kept_automaton, kept_brute = functools.cache(automaton_of), functools.cache(Brute)


def cases(part: int):
    """Regexes with an automaton, each with its answers of some length; of a sequence of which a block is shown."""
    for number in range(part, NUM_REGEXES, 4):
        rng = random.Random(number)
        regex = random_regex(rng)
        try:
            automaton = kept_automaton(regex)
        except ConstraintError:
            continue
        yield rng, automaton, kept_brute(regex, LENGTH, rng.choice([LENGTH, LENGTH, LENGTH - 1, LENGTH - 2]))


@pytest.mark.parametrize("part", range(4))
def test_allowed_tokens_are_those_of_some_answer(part: int):
    seen = 0
    for rng, automaton, brute in cases(part):
        length = rng.randint(1, LENGTH)  # the first positions; the others lie behind the block
        canvases = np.stack([random_canvas(rng, brute, length) for _ in range(CANVASES)])
        answer = Answer(automaton, 10, 10 + brute.limit, 10 + LENGTH, 10, length)
        allowed = answer.constraint().allowed(canvases)
        expected = [brute.allowed(canvas) for canvas in canvases]
        np.testing.assert_array_equal(as_ids(automaton, allowed), expected, err_msg=brute.regex)
        can = [len(brute.that_have(canvas)) > 0 for canvas in canvases]
        np.testing.assert_array_equal(answer.constraint().completable(canvases), can, err_msg=brute.regex)
        seen += len(canvases)
    assert seen > 0.9 * NUM_REGEXES / 4 * CANVASES


def test_the_first_token_that_no_answer_has_is_found():
    num_found = 0
    for rng, automaton, brute in cases(1):
        whole = BlockConstraint(automaton, 0, np.equal(automaton.distance, 0), brute.limit)
        for canvas in [random_canvas(rng, brute, brute.limit) for _ in range(CANVASES) if len(brute.answers)]:
            unmet = (i for i in range(brute.limit) if not len(brute.that_have(canvas[: i + 1])))
            expected = next(unmet, None)
            assert whole.first_unmet(canvas) == expected, (brute.regex, canvas)
            num_found += expected is not None
    assert num_found > 100


def test_the_rest_of_an_answer_follows_from_its_beginning():
    for rng, automaton, brute in cases(0):
        if not len(brute.answers):
            continue
        first = rng.randint(1, LENGTH - 1)
        known = rng.choice(brute.answers)[:first]
        answer = Answer(automaton, 3, 3 + brute.limit, 3 + LENGTH, 3, first)
        rest = np.full(LENGTH - first, -1)
        answer.take(known.tolist())
        answer.block_length = LENGTH - first
        constraint = answer.constraint()
        allowed, can = constraint.allowed(rest[None]), constraint.completable(rest[None])
        expected = brute.allowed(np.concatenate([known, rest]))[first:]
        assert can.all()
        np.testing.assert_array_equal(as_ids(automaton, allowed)[0], expected, err_msg=brute.regex)


def test_what_is_given_behind_the_block_counts():
    seen = 0
    for rng, automaton, brute in cases(2):
        for _ in range(10):
            canvas, length = random_canvas(rng, brute, LENGTH), rng.randint(1, LENGTH - 1)
            pins = Pins(10 + length, canvas[length:])
            answer = Answer(automaton, 10, 10 + brute.limit, 10 + LENGTH, 10, length, pins=pins)
            allowed = answer.constraint().allowed(canvas[None, :length])
            np.testing.assert_array_equal(as_ids(automaton, allowed)[0], brute.allowed(canvas)[:length])
            assert answer.constraint().completable(canvas[None, :length])[0] == (len(brute.that_have(canvas)) > 0)
            seen += bool(allowed.any())
    assert seen > 50


def test_of_several_positions_each_is_taken_if_the_whole_stays_completable():
    dropped = 0
    for rng, automaton, brute in cases(1):
        constraint = Answer(automaton, 0, brute.limit, LENGTH, 0, LENGTH).constraint()
        for _ in range(10):
            canvas = random_canvas(rng, brute, LENGTH)
            masked = np.flatnonzero(canvas == -1).tolist()
            allowed = brute.allowed(canvas)
            if not masked or not allowed.any():
                continue
            rng.shuffle(masked)
            tokens = [rng.choice(np.flatnonzero(allowed[place]).tolist()) for place in masked]
            kept = constraint.keep(canvas, masked, tokens)
            expected = []
            for place, token in zip(masked, tokens, strict=True):
                tried = canvas.copy()
                tried[place] = token
                expected.append(len(brute.that_have(tried)) > 0)
                canvas = tried if expected[-1] else canvas
            assert kept == expected, brute.regex
            assert kept[0], "the first one is allowed by itself"
            dropped += kept.count(False)
    assert dropped > 50


def test_many_canvases_are_as_one_by_one():
    rng = random.Random(5)
    automaton, brute = automaton_of("(?:ab|ba)*b?"), Brute("(?:ab|ba)*b?", LENGTH, LENGTH)
    canvases = np.stack([random_canvas(rng, brute, LENGTH) for _ in range(150)])
    constraint = Answer(automaton, 0, LENGTH, LENGTH, 0, LENGTH).constraint()
    allowed, can = constraint.allowed(canvases), constraint.completable(canvases)
    alone = [(constraint.allowed(canvas[None]), constraint.completable(canvas[None])) for canvas in canvases]
    np.testing.assert_array_equal(allowed, np.concatenate([each for each, _ in alone]))
    np.testing.assert_array_equal(can, np.concatenate([each for _, each in alone]))


def test_a_block_shows_the_part_of_it_that_is_answer():
    answer = Answer(automaton_of("a*"), begin=6, limit=11, end=12, block_start=4, block_length=4)
    assert answer.part == slice(2, 4)  # behind the prompt's end
    assert answer.part_of(8) == slice(0, 4)
    assert answer.part_of(10) == slice(0, 2)  # a block that ends with its sequence
    assert answer.part_of(12) == slice(0, 0)
    answer.take([MASK, MASK, 0, 0])
    allowed = answer.constraint().allowed(np.full((1, 4), -1))
    assert not as_ids(answer.automaton, allowed)[0, 3, : max(TEXTS)].any(), "the reply is cut before it"


def test_the_mask_and_what_has_no_bytes_are_never_allowed():
    automaton = automaton_of("[ab]*")
    allowed = Answer(automaton, 0, 3, 3, 0, 3).constraint().allowed(np.full((1, 3), -1))
    ids = as_ids(automaton, allowed)[0]
    assert not ids[:, MASK].any()
    assert ids[:, [*TEXTS, END, OTHER_END]].all()


def test_an_automaton_survives_the_way_to_another_process():
    automaton = automaton_of("(?:ab)+|b{2,3}")
    again = Automaton.from_bytes(automaton.to_bytes())
    for name in ("step", "class_of", "is_final", "distance"):
        np.testing.assert_array_equal(getattr(again, name), getattr(automaton, name))
    assert again.end_class == automaton.end_class
