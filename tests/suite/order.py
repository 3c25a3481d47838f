"""Which tests run in one process, and the order of these groups (`--dist loadgroup`, see docs/testing.md)."""

from collections.abc import Iterable
from typing import Any

import pytest

FIRST = ("server", "both cores")
"""Groups that begin a run; each runs in one process, and those that follow fill the other one meanwhile."""


def group_of(item: pytest.Item) -> str:
    """Return the group that a test names by `xdist_group`, else its file; several names are one, as in xdist."""
    names = {str(marker.args[0]) for marker in item.iter_markers("xdist_group")}
    return "_".join(sorted(names)) or item.nodeid.partition("::")[0]


def group_items(items: list[pytest.Item]) -> None:
    """Put the tests of a group side by side: those of servers first, then those of engines, the longest groups first.

    The worker that is free takes the next group, so what is long must not come last.
    """
    groups: dict[str, list[pytest.Item]] = {}
    for item in items:
        name = group_of(item)
        groups.setdefault(name, []).append(item)
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(name))

    def rank(name: str) -> tuple[bool, bool]:
        return name not in FIRST, not any("engine" in item.keywords for item in groups[name])

    items[:] = [item for name in sorted(groups, key=rank) for item in groups[name]]


def check_groups(ids: list[str]) -> None:
    """Check that xdist took the groups over; its workers hand them on in the tests' names, as `NAME@GROUP`.

    Raises: pytest.UsageError where a version of pytest or xdist does not, and would run each test anywhere.
    """
    lost = [name for name in ids if "@" not in name.rpartition("]")[2]]
    if lost:
        raise pytest.UsageError(f"xdist lost the group of {lost[0]}; install the pins of requirements/dev.txt")


def configurations(name: str, usual: Iterable[Any], slow: Iterable[Any] = ()) -> list[Any]:
    """Return the params of a fixture that starts engines: the tests of each configuration are a group.

    Args:
        name: begins the groups' names. Files that give the same name and configuration share the group.
        usual: what each run tests.
        slow: what only runs with the slow tests `configurations` test, too.
    """
    marked = [(value, []) for value in usual] + [(value, [pytest.mark.slow("configurations")]) for value in slow]
    return [
        pytest.param(value, id=str(value), marks=[*marks, pytest.mark.xdist_group(f"{name} {value}")])
        for value, marks in marked
    ]
