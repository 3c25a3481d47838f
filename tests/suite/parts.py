"""Tests of which a slow group has more than every run has: more drawn cases, or the same on the emulator.

Such a test has one name in all runs, so its file and all that it imports are among the group's sources
(`tests/suite/test_slow.py` checks that).
"""

running: set[str] = set()
"""The slow groups that run; `slow.configure` puts them there before tests are collected."""


def some_of(number: int, part: int = 5) -> int:
    """Return how many of a `number` of cases to try: all where the slow group `cases` runs, else one of each `part`."""
    return number if "cases" in running else -(-number // part)
