"""A slow group runs again after each change of its sources, and a slow test after a change of its file."""

import argparse
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.suite import parts, slow
from tests.suite.imports import needed_by


def test_each_group_has_sources_without_what_it_leaves_out() -> None:
    found = {group: {slow.name_of(path) for path in slow.files_of(group)} for group in slow.SOURCES}
    assert all(found.values())
    scheduler, http = "vllm_dllm/engine/scheduler.py", "vllm_dllm/engine/bodies.py"
    assert {group for group, files in found.items() if scheduler in files and http not in files} == {
        *("calibrate", "configurations", "engines", "ranks"),
    }


HAS_PARTS = {"cases": re.compile(r"\bsome_of\("), "kernels": re.compile(r"\bsimt\.(WHERE|PLACES)\b")}
"""How tests say, beside the mark, that a group has more of them."""


NARROW = {"answers", "bench", "demo", "examples", "fields", "fuzz", "load", "operator", "readme"}
"""Groups that leave out what other tests show on purpose, see docs/testing.md."""


@pytest.mark.parametrize("group", sorted(slow.SOURCES.keys() - NARROW))
def test_what_a_groups_tests_import_are_its_sources(group: str) -> None:
    """But for what the group leaves out in so many words; the others' sources are narrower by intention."""
    marked = re.compile(
        rf'slow\("{group}"\)' + (r"|configurations\(" if group in {"engines", "configurations"} else "")
    )
    files = [path for path in sorted(slow.ROOT.glob("tests/**/test_*.py")) if path.parent.name != "suite"]
    users = [
        path for path in files if any(each.search(path.read_text()) for each in (marked, HAS_PARTS.get(group, marked)))
    ]
    assert users
    out = {path for path in slow.left_out_of(group) if not slow.name_of(path).startswith("tests/")}
    missing = {
        f"{slow.name_of(path)}: {slow.name_of(file)}"
        for path in users
        for file in needed_by(path) - {path} - out - set(slow.files_of(group))
        if file.name != "__init__.py" and file.parent.name != "suite"
    }
    assert not missing, "\n".join(sorted(missing))


def test_some_of_the_cases_are_tried_in_each_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "running", set())
    assert [parts.some_of(number) for number in (1, 5, 6, 150)] == [1, 1, 2, 30]
    monkeypatch.setattr(parts, "running", {"cases"})
    assert parts.some_of(150) == 150


def run(option: str, *args: str, worker: bool = False, **options: Any) -> Any:
    """What `record` looks at of a run; `HASHES` as `configure` puts them there."""
    values = {**dict.fromkeys(slow.PARTIAL), "override_ini": ["strict_markers=true"]} | options
    config = SimpleNamespace(
        args=list(args) or ["tests"],
        stash={slow.HASHES: {"bench": "new"}},
        getini={"testpaths": ["tests"], "addopts": ["--strict-markers", "-ra"]}.get,
        getoption=({"--slow": option} | values).get,
    )
    if worker:
        config.workerinput = {}
    return config


def test_what_makes_a_run_partial_are_options_of_pytest(pytestconfig: pytest.Config) -> None:
    assert all(hasattr(pytestconfig.option, name) for name in slow.PARTIAL)


def test_the_projects_own_options_make_no_run_partial(pytestconfig: pytest.Config) -> None:
    strict = {each for each in pytestconfig.getoption("override_ini") or () if each.startswith("strict_")}
    assert strict <= slow.own_overrides(pytestconfig)
    assert "strict_markers=true" in slow.own_overrides(pytestconfig)


@pytest.mark.parametrize("option", ["changed", "all", "only"])
def test_a_whole_run_that_passes_is_written_down(option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow, "PROVEN", tmp_path / "slow.json")
    proofs = [
        run("none"),
        run("bench,load"),
        run(option, "tests/ops"),
        *(run(option, **{name: ["a"]}) for name in slow.PARTIAL),
        run(option, override_ini=["testpaths=tests/ops"]),
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
    assert set(slow.chosen("bench,load", {})) == {"bench", "load"}


def test_groups_are_asked_for_by_name() -> None:
    assert slow.option("engines,cases") == "engines,cases"
    with pytest.raises(
        argparse.ArgumentTypeError, match="'case' is not known; allowed are none, changed, only, all, or"
    ):
        slow.option("engines,case")


@pytest.mark.parametrize("is_always", [False, True])
def test_every_run_has_what_is_marked_always_in_a_slow_file(is_always: bool) -> None:
    module, item = object(), _item(is_always, [])
    item.iter_markers_with_node = lambda _: iter([(module, pytest.mark.slow("engines").mark)])
    mark = slow.mark_of(item)
    assert (mark is None) == is_always
    own = pytest.mark.slow("configurations").mark
    item.iter_markers_with_node = lambda _: iter([(item, own), (module, pytest.mark.slow("engines").mark)])
    assert slow.mark_of(item) is own, "a parameter's mark is not its file's"


PARAMETERS = """
import pytest

@pytest.fixture(params=["usual", pytest.param("further", marks=pytest.mark.slow("engines"))])
def engine(request): ...

@pytest.mark.parametrize("count", ["few", pytest.param("many", marks=pytest.mark.slow("fuzz"))])
def test_requests(engine, count): ...
"""


def test_the_group_of_a_parameter_of_a_test_comes_before_that_of_its_fixtures(tmp_path: Path) -> None:
    """So `--slow fuzz` has many requests with each engine, and `--slow engines` few with each."""
    (tmp_path / "test_it.py").write_text(PARAMETERS)
    marks = {}

    class Marks:
        @staticmethod
        def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
            marks.update({item.name: slow.mark_of(item) for item in items})

    options = ["--collect-only", "-q", "-c", "/dev/null", f"--rootdir={tmp_path}", "-p", "no:cacheprovider"]
    options += ["--import-mode=importlib", "-p", "no:faulthandler"]
    assert pytest.main([*options, str(tmp_path / "test_it.py")], plugins=[Marks()]) == 0
    assert {name: mark and mark.args for name, mark in marks.items()} == {
        "test_requests[usual-few]": None,
        "test_requests[usual-many]": ("fuzz",),
        "test_requests[further-few]": ("engines",),
        "test_requests[further-many]": ("fuzz",),
    }


def _item(is_always: bool, marks: list[Any]) -> Any:
    """What `mark_of` looks at of a test."""
    item = SimpleNamespace(get_closest_marker=lambda _: pytest.mark.always.mark if is_always else None)
    item.iter_markers_with_node = lambda _: iter([(item, mark) for mark in marks])
    return item


@pytest.mark.parametrize(("name", "runs"), [("tests/a.py", True), ("tests/b.py", False)])
def test_a_slow_test_runs_where_its_file_is_changed(name: str, runs: bool) -> None:
    mark = pytest.mark.slow("bench").mark
    item = _item(False, [mark])
    item.path, item.nodeid = slow.ROOT / name, name
    out: list[Any] = []
    config: Any = SimpleNamespace(
        stash={slow.CHOSEN: {"tests/a.py": "changed"}},
        getoption={"--slow": "changed"}.get,
        hook=SimpleNamespace(pytest_deselected=lambda items: out.extend(items)),
    )
    items = [item]
    slow.select(config, items)
    assert (items, out) == (([item], []) if runs else ([], [item]))
