"""Where bad words leave a position nothing: what admission asks before a request is served."""

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Set

Word = tuple[int, ...]


def dead_end(
    choices: Collection[int], before: Set[int], behind: Set[int], words: Iterable[Word], room: float = math.inf
) -> tuple[Word, Word] | None:
    """Find known tokens around a masked position beside which each token that it may have would complete a word.

    Positions are unmasked in any order, so whichever token of a word is known last is barred (`edits.BadWords`): with
    the word (5, 6) both are, between a 5 and a 6. Known tokens have no whole word themselves, and any that have none
    may come to be. What is barred grows with them; so of those before the position the longest that a word has before
    its last one is looked at, and of those behind it alike.

    Args:
        choices: tokens that the position may have but for words.
        before, behind: tokens that positions there may have.
        words: of one token and more, none of them a choice alone.
        room: positions of the answer before it, at most.

    Returns: the tokens before and behind it; None: a token is always left, wherever in an answer the position is.
    """
    words = {*words}
    bit = {token: 1 << number for number, token in enumerate(choices)}
    every = (1 << len(bit)) - 1
    lacking_one: dict[Word, list[tuple[Word, int]]] = defaultdict(list)  # what is before it -> behind it, and its bit
    for left, token, right in (
        (word[:place], token, word[place + 1 :]) for word in words for place, token in enumerate(word)
    ):
        if token in bit and before >= {*left} and behind >= {*right}:
            lacking_one[left].append((right, bit[token]))
    for left in {(), *lacking_one}:
        if len(left) > room or _has_any(left, words):
            continue
        barred: dict[Word, int] = defaultdict(int, {(): 0})  # what is behind the position -> bits
        for begin in range(len(left) + 1):
            for right, own in lacking_one.get(left[begin:], ()):
                barred[right] |= own
        for right in barred if _union(barred.values()) == every else ():
            its = _union(barred.get(right[:length], 0) for length in range(len(right) + 1))
            if its == every and not _has_any(right, words):
                return left, right
    return None


def _union(sets: Iterable[int]) -> int:
    union = 0
    for each in sets:
        union |= each
    return union


def _has_any(tokens: Word, words: Set[Word]) -> bool:
    """Tell whether some tokens have a word in them."""
    length = len(tokens)
    return any(tokens[begin:end] in words for begin in range(length) for end in range(begin + 1, length + 1))
