"""The vote of examples/hex.py."""

import runpy
from pathlib import Path

HEX = runpy.run_path(str(Path(__file__).parents[1] / "examples/hex.py"))


def test_the_most_frequent_answer_wins_and_of_equals_the_first() -> None:
    texts = ["so 7", "it is 12.5", "12.5.", "none", "7", "9"]
    assert HEX["most_frequent"](texts, r"-?[\d.]*\d(?=\D*$)") == ("7", 2)
    assert HEX["most_frequent"](texts[1:], r"-?[\d.]*\d(?=\D*$)") == ("12.5", 2)
    assert HEX["most_frequent"](["none"], r"\d") == ("", 0)
