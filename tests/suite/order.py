"""Which tests run in one process, and the order of these groups (`--dist loadgroup`, see docs/testing.md)."""

from collections.abc import Iterable
from typing import Any

import pytest

FIRST = ("server", "both cores")
"""Groups that begin a run; each runs in one process, and those that follow fill the other one meanwhile."""

DEAR = (
    *("tests/reference/test_ends.py", "tests/draft/test_exact_cases.py", "tests/cli/test_neighbours.py"),
    *("tests/test_structure.py", "tests/test_site.py", "tests/statements/test_rules.py"),
    *("tests/models/test_checkpoint_tensors.py", "tests/unmask/test_torch_policies.py"),
    *("tests/reference/test_wedlm_spiffy.py", "tests/constraint/test_denoise.py", "tests/test_gpu_scripts.py"),
    *("tests/models/test_quantised_tensors.py", "tests/self_test/test_self_test.py", "tests/reference/test_spiffy.py"),
)
"""Groups without an engine that take 10 s and more, the longest first; a last one would leave a process idle."""


def group_of(item: pytest.Item) -> str:
    """Return the group that a test names by `xdist_group`, else its file; several names are one, as in xdist."""
    names = {str(marker.args[0]) for marker in item.iter_markers("xdist_group")}
    return "_".join(sorted(names)) or item.nodeid.partition("::")[0]


def group_items(items: list[pytest.Item]) -> None:
    """Put the tests of a group side by side: servers first, then engines, then the others, of these the dear first.

    The worker that is free takes the next group, so what is long must not come last.
    """
    groups: dict[str, list[pytest.Item]] = {}
    for item in items:
        name = group_of(item)
        groups.setdefault(name, []).append(item)
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(name))

    def rank(name: str) -> tuple[bool, bool, int]:
        has_engine = any("engine" in item.keywords for item in groups[name])
        return name not in FIRST, not has_engine, DEAR.index(name) if name in DEAR else len(DEAR)

    items[:] = [item for name in sorted(groups, key=rank) for item in groups[name]]


def check_groups(ids: list[str]) -> None:
    """Check that xdist took the groups over; its workers hand them on in the tests' names, as `NAME@GROUP`.

    Raises: pytest.UsageError where a version of pytest or xdist does not, and would run each test anywhere.
    """
    lost = [name for name in ids if "@" not in name.rpartition("]")[2]]
    if lost:
        raise pytest.UsageError(f"xdist lost the group of {lost[0]}; install the pins of requirements/dev.txt")


def configurations(name: str, always: Iterable[Any], usual: Iterable[Any] = (), slow: Iterable[Any] = ()) -> list[Any]:
    """Return the params of a fixture that starts engines: the tests of each configuration are a group.

    Args:
        name: begins the groups' names. Files that give the same name and configuration share the group.
        always: what runs whenever a test does.
        usual: what runs with the slow tests `engines` alone.
        slow: what runs with the slow tests `configurations` alone.
    """
    marked = [
        *((value, []) for value in always),
        *((value, [pytest.mark.slow("engines")]) for value in usual),
        *((value, [pytest.mark.slow("configurations")]) for value in slow),
    ]
    return [
        pytest.param(value, id=str(value), marks=[*marks, pytest.mark.xdist_group(f"{name} {value}")])
        for value, marks in marked
    ]
