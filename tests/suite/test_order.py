"""What is long begins, and the tests of a group stay together."""

from typing import Any

import pytest

from tests.suite.order import DEAR, group_items
from tests.tree import ROOT


class Item:
    """A collected test: what is looked at to sort it."""

    def __init__(self, nodeid: str, *marks: pytest.MarkDecorator) -> None:
        self.nodeid = nodeid
        self.marks = [each.mark for each in marks]
        self.keywords = {each.name for each in self.marks}

    def iter_markers(self, name: str) -> list[pytest.Mark]:
        return [each for each in self.marks if each.name == name]

    def get_closest_marker(self, name: str) -> pytest.Mark | None:
        return next(iter(self.iter_markers(name)), None)

    def add_marker(self, mark: pytest.MarkDecorator) -> None:
        self.marks.append(mark.mark)


def test_servers_begin_then_engines_then_what_is_dear() -> None:
    server, engine = pytest.mark.xdist_group("server"), pytest.mark.engine
    items: list[Any] = [
        Item("tests/a.py::1"),
        Item(f"{DEAR[1]}::1"),
        Item("tests/e.py::1", engine),
        Item("tests/s.py::1", server, engine),
        Item(f"{DEAR[0]}::1"),
        Item("tests/a.py::2"),
        Item("tests/t.py::1", server, engine),
    ]
    group_items(items)
    assert [each.nodeid for each in items] == [
        *("tests/s.py::1", "tests/t.py::1", "tests/e.py::1"),
        *(f"{DEAR[0]}::1", f"{DEAR[1]}::1", "tests/a.py::1", "tests/a.py::2"),
    ]
    assert {each.get_closest_marker("xdist_group").args[0] for each in items[-2:]} == {"tests/a.py"}


def test_what_is_dear_is_there() -> None:
    assert not [name for name in DEAR if not (ROOT / name).is_file()]
