"""A slow group runs again after each change of its sources, and a slow test after a change of its file."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.suite import slow


def test_each_group_has_sources_without_what_it_leaves_out() -> None:
    found = {group: {slow.name_of(path) for path in slow.files_of(group)} for group in slow.SOURCES}
    assert all(found.values())
    scheduler, http = "vllm_dllm/engine/scheduler.py", "vllm_dllm/engine/bodies.py"
    assert {group for group, files in found.items() if scheduler in files and http not in files} == {
        *("configurations", "ranks"),
    }


def run(option: str, *args: str, worker: bool = False, **options: Any) -> Any:
    """What `record` looks at of a run; `HASHES` as `configure` puts them there."""
    values = dict.fromkeys(slow.PARTIAL) | options
    config = SimpleNamespace(
        args=list(args) or ["tests"],
        stash={slow.HASHES: {"bench": "new"}},
        getini={"testpaths": ["tests"]}.get,
        getoption=({"--slow": option} | values).__getitem__,
    )
    if worker:
        config.workerinput = {}
    return config


def test_what_makes_a_run_partial_are_options_of_pytest(pytestconfig: pytest.Config) -> None:
    assert all(hasattr(pytestconfig.option, name) for name in slow.PARTIAL)


@pytest.mark.parametrize("option", ["changed", "all", "only"])
def test_a_whole_run_that_passes_is_written_down(option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow, "PROVEN", tmp_path / "slow.json")
    proofs = [
        run("none"),
        run(option, "tests/ops"),
        *(run(option, **{name: ["a"]}) for name in slow.PARTIAL),
        run(option, worker=True),
    ]
    for config in proofs:
        slow.record(config, 0)
    slow.record(run(option), 1)
    assert not slow.PROVEN.exists()
    slow.record(run(option), 0)
    assert json.loads(slow.PROVEN.read_text()) == {"bench": "new"}
    assert slow.chosen("changed", {"bench": "new", "load": "1"}) == {"load": "it has not passed before"}
    assert slow.chosen("changed", {"bench": "newer"}) == {"bench": "its sources changed"}


def test_what_is_changed_runs_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marked, source = tmp_path / "test_marked.py", tmp_path / "source.py"
    marked.write_text("")
    source.write_text("")
    monkeypatch.setattr(slow, "files_of", lambda group: [source] if group == "load" else [])
    monkeypatch.setattr(slow, "marked_files", lambda: [marked])
    monkeypatch.setattr(slow, "ROOT", tmp_path)
    monkeypatch.setattr(slow, "PROVEN", tmp_path / "slow.json")
    slow.PROVEN.write_text(json.dumps(slow.hashes()))
    assert slow.chosen("changed", slow.hashes()) == {}
    marked.write_text("# another")
    assert set(slow.chosen("changed", slow.hashes())) == {"test_marked.py"}
    source.write_text("# another")
    assert set(slow.chosen("changed", slow.hashes())) == {"test_marked.py", "load"}
    assert slow.chosen("none", {}) == {}
    assert set(slow.chosen("all", slow.hashes())) == {"test_marked.py", *slow.SOURCES}


@pytest.mark.parametrize(("name", "runs"), [("tests/a.py", True), ("tests/b.py", False)])
def test_a_slow_test_runs_where_its_file_is_changed(name: str, runs: bool) -> None:
    mark = pytest.mark.slow("bench").mark
    item: Any = SimpleNamespace(path=slow.ROOT / name, get_closest_marker=lambda _: mark, nodeid=name)
    out: list[Any] = []
    config: Any = SimpleNamespace(
        stash={slow.CHOSEN: {"tests/a.py": "changed"}},
        getoption={"--slow": "changed"}.get,
        hook=SimpleNamespace(pytest_deselected=lambda items: out.extend(items)),
    )
    items = [item]
    slow.select(config, items)
    assert (items, out) == (([item], []) if runs else ([], [item]))
