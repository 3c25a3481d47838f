"""The tests marked `slow(group)`, and when a run may leave them out.

`slow.json` holds for each group a hash of its sources, written where a whole run passed (`make test`, `make test-all`).
With `--slow changed`, as in CI, a group runs unless its sources are still the same; the header of the run says which.
Groups can be asked for by name, too: `--slow engines,cases`.
"""

import argparse
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.suite import parts

ROOT = Path(__file__).parents[2]
PROVEN = Path(__file__).with_name("slow.json")
CHOICES = ("none", "changed", "only", "all")
WHOLE = ("changed", "only", "all")
"""Choices behind which all groups have passed on the present sources."""

OF_SERVERS = ("bodies", "compile_ahead", "explain", "malformed", "reply_stream", "score_route")
OF_MEASUREMENTS = ("measuring", "neighbours", "recording", "trajectories")
PINS = ("requirements/build.txt", "requirements/vllm.txt", "requirements/serve.txt")
OF_REQUESTS = ("vllm_dllm/models/__init__.py", "vllm_dllm/models/interface.py")
KERNELS = ("vllm_dllm/ops/**", "csrc/bindings/**", "csrc/cpu/**", "csrc/include/**")
HELPERS = (
    *("tests/e2e/*.py", "!tests/e2e/test_*.py", "tests/e2e/test_graphs.py", "tests/e2e/test_sdar_cache.py"),
    *("tests/models/in_process.py", "tests/statements/*.py", "tests/conftest.py"),
    *("examples/tiny_llada/checkpoint/*", "examples/own_policy/**", "examples/training/tasks.py"),
    "docs/add-a-policy.md",
    *("tests/constraint/brute.py", "tests/constraint/test_denoise.py"),
    *("tests/draft/[!t]*.py", "tests/draft/test_exact*.py", "tests/draft/test_look_ahead.py"),
    *("tests/reference/conftest.py", "tests/reference/test_first_token.py", "tests/reference/test_qwen.py"),
    *("tests/reference/test_self_speculation.py", "tests/unmask/edited.py", "tests/unmask/torch_policies.py"),
    *("benchmarks/armed.py", "benchmarks/launches.py", "benchmarks/constraint_fuzz.py", "benchmarks/fuzz/**"),
    *("vllm_dllm/measure/report.py", "vllm_dllm/measure/workload.py"),
)
"""What tests with an engine import, and read besides."""
BELOW_ENGINES = (
    *("vllm_dllm/*.py", "vllm_dllm/attention/**", "vllm_dllm/constraint/**", "vllm_dllm/draft/**"),
    *("vllm_dllm/models/**", "vllm_dllm/state/**", "vllm_dllm/unmask/**", "vllm_dllm/reference/**", *KERNELS, *PINS),
    *("vllm_dllm/self_test/**", *HELPERS),
)
IN_ENGINES = (
    *BELOW_ENGINES,
    *("vllm_dllm/engine/**", *(f"!vllm_dllm/engine/{name}.py" for name in (*OF_SERVERS, *OF_MEASUREMENTS))),
)
"""What runs in an engine of a test's own process: not what reads requests over HTTP, nor what is asked for by name."""

SOURCES: dict[str, tuple[str, ...]] = {
    "answers": (
        *("vllm_dllm/draft/**", "vllm_dllm/unmask/**", "vllm_dllm/denoiser.py", "vllm_dllm/models/**"),
        *("examples/tiny_llada/**", "examples/training/tasks.py", "examples/quantise.py"),
        "tests/e2e/test_quantised.py",
    ),
    "bench": (
        *("vllm_dllm/measure/**", "vllm_dllm/engine/measuring.py", "vllm_dllm/cli/*bench*.py", "benchmarks/*.py"),
        *("tests/measure/**", "tests/e2e/test_bench.py", "vllm_dllm/reference/**", "examples/tiny_*/checkpoint/*"),
    ),
    "cases": (
        *("vllm_dllm/*.py", "vllm_dllm/attention/**", "vllm_dllm/constraint/**", "vllm_dllm/draft/**"),
        *("vllm_dllm/reference/**", "vllm_dllm/state/**", "vllm_dllm/unmask/**", *KERNELS, *OF_REQUESTS),
        *("examples/tiny_*/checkpoint/*", "tests/constraint/*", "tests/draft/*", "tests/ops/*", "tests/reference/*"),
        *("tests/statements/*", "tests/unmask/*", "tests/e2e/questions.py", "tests/state/test_canvas.py"),
        "examples/training/tasks.py",
    ),
    "calibrate": (
        *IN_ENGINES,
        *("vllm_dllm/engine/recording.py", "vllm_dllm/calibrate/**", "vllm_dllm/cli/**"),
        *("examples/tiny_llada/questions.jsonl", "tests/e2e/test_calibrate*.py"),
    ),
    "configurations": IN_ENGINES,
    "demo": ("examples/**", "vllm_dllm/studio/**", "requirements/serve.txt", "tests/e2e/test_demo.py"),
    "kernels": (
        *("csrc/**", "CMakeLists.txt", "tests/simt/*", "tests/ops/*", "tests/self_test/*", "requirements/build.txt"),
        *("vllm_dllm/ops/**", "vllm_dllm/attention/**", "vllm_dllm/draft/**", "vllm_dllm/state/**"),
        *("vllm_dllm/constraint/**", "vllm_dllm/unmask/**", "vllm_dllm/self_test/**", "vllm_dllm/*.py", *OF_REQUESTS),
        "tests/state/test_canvas.py",
    ),
    "engines": IN_ENGINES,
    "examples": (
        *("examples/*.py", "examples/*.sh", "vllm_dllm/cli/**", "vllm_dllm/spiffy_config.py"),
        *("vllm_dllm/engine/front_end.py", "tests/e2e/test_examples.py", "docs/examples.md"),
        *("examples/tiny_llada/checkpoint/*", "examples/tiny_llada/questions.jsonl"),
    ),
    "fields": ("vllm_dllm/models/**", "vllm_dllm/reference/**", "tests/models/*"),
    "fuzz": (
        *("vllm_dllm/config.py", "vllm_dllm/engine/request.py", "vllm_dllm/engine/edits.py"),
        "tests/e2e/test_spiffy_config.py",
        *("vllm_dllm/constraint/**", "vllm_dllm/engine/structured.py", "benchmarks/constraint_fuzz.py"),
        *("benchmarks/fuzz/**", "tests/e2e/test_structured.py"),
    ),
    "isas": (
        *("CMakeLists.txt", "MANIFEST.in", "pyproject.toml", "setup.py", *KERNELS),
        *("tests/ops/*", "tests/test_wheel.py", "tests/tree.py", "csrc/probe/*", "requirements/build.txt"),
    ),
    "load": (
        *("vllm_dllm/engine/**", "vllm_dllm/state/**", "vllm_dllm/constraint/**", "vllm_dllm/unmask/**", *PINS),
        *("vllm_dllm/*.py", "benchmarks/soak.py", "benchmarks/fuzz/**", "tests/e2e/test_soak.py"),
    ),
    "operator": (
        *("vllm_dllm/engine/**", "vllm_dllm/plugin.py", "docs/operate.md", *PINS),
        *("tests/e2e/http.py", "tests/e2e/test_operator.py"),
    ),
    "ranks": (*IN_ENGINES, "tests/engine/head_ranks.py"),
    "readme": ("README.md", "tests/e2e/test_readme.py"),
    "servers": (*BELOW_ENGINES, "vllm_dllm/engine/**", "docs/openai.md", "examples/scaffold.py"),
}
"""What each group tests that no test of every run does: files, as globs in the repository, without those behind "!".

Tests with an engine reach all files of the package, so what a group adds to the tests of every run is for us to say
(docs/testing.md says why). The file that a slow test is in is one of its sources, too.
"""

MARKS = re.compile(r"mark\.slow\(|configurations\(")

BUILT = {".so", ".pyc"}


def files_of(group: str) -> list[Path]:
    """Return the files of a group, in order.

    Raises: ValueError for a glob that matches nothing.
    """
    files: set[Path] = set()
    for pattern in SOURCES[group]:
        glob = pattern.removeprefix("!")  # "**" matches folders alone before Python 3.13
        found = {path for path in ROOT.glob(glob + "/*" if glob.endswith("**") else glob) if path.is_file()}
        if not found:
            raise ValueError(f"the slow group {group!r} has the sources {pattern!r}, which match no file")
        files = files - found if pattern.startswith("!") else files | found
    return sorted(path for path in files if path.suffix not in BUILT)


def left_out_of(group: str) -> set[Path]:
    """Return the files behind "!"."""
    return {path for pattern in SOURCES[group] if pattern[0] == "!" for path in ROOT.glob(pattern[1:])}


def marked_files() -> list[Path]:
    """Return the files with tests that are marked slow."""
    return [path for path in sorted(ROOT.glob("tests/**/test_*.py")) if MARKS.search(path.read_text())]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def hashes() -> dict[str, str]:
    """Hash the sources of each group, and each file with tests that are marked slow."""
    groups = {group: _hash(files_of(group)) for group in SOURCES}
    return groups | {name_of(path): _hash([path]) for path in marked_files()}


def _hash(files: Iterable[Path]) -> str:
    """Hash names and contents."""
    digest = hashlib.sha256()
    for path in files:
        content = path.read_bytes()
        digest.update(f"{name_of(path)}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:32]


def proven() -> dict[str, str]:
    """Return the hashes that the slow tests last passed with; a file that is no JSON proves nothing."""
    try:
        found: dict[str, str] = json.loads(PROVEN.read_text())
    except (OSError, ValueError):
        return {}
    return found


def option(text: str) -> str:
    """Check the value of `--slow`: one of `CHOICES`, or groups with commas between them."""
    unknown = [name for name in text.split(",") if text not in CHOICES and name not in SOURCES]
    if unknown:
        allowed = f"{', '.join(CHOICES)}, or groups with commas between them: {', '.join(SOURCES)}"
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not known; allowed are {allowed}")
    return text


def chosen(option: str, now: dict[str, str]) -> dict[str, str]:
    """Return each group, and each file with tests marked slow, that runs, and why."""
    if option in {"all", "only"}:
        return dict.fromkeys(now, "asked for")
    if option not in CHOICES:
        return dict.fromkeys(option.split(","), "asked for")
    before = proven()
    return {
        name: "its sources changed" if name in before else "it has not passed before"
        for name, value in now.items()
        if before.get(name) != value
    }


HASHES = pytest.StashKey[dict[str, str]]()
CHOSEN = pytest.StashKey[dict[str, str]]()


def configure(config: pytest.Config) -> None:
    """Hash the sources as they are when the run begins."""
    option = config.getoption("--slow")
    config.stash[HASHES] = hashes() if option in WHOLE else {}
    config.stash[CHOSEN] = chosen(option, config.stash[HASHES])
    parts.running |= config.stash[CHOSEN].keys() & SOURCES.keys()


def header(config: pytest.Config) -> list[str]:
    """Say for each group whether it runs, and why."""
    runs, option = config.stash[CHOSEN], config.getoption("--slow")
    left_out = "it passed on these sources (tests/suite/slow.json)" if option in WHOLE else f"--slow is {option}"
    names = dict.fromkeys((*SOURCES, *runs))
    reasons = {name: f"run, {runs[name]}" if name in runs else f"left out, {left_out}" for name in names}
    return [f"slow tests, {group}: {reason}" for group, reason in reasons.items()]


def mark_of(item: pytest.Item) -> pytest.Mark | None:
    """Return the mark `slow` that holds for a test: its own, or else its file's, but not where it is marked `always`.

    Of several of its own it is the last, which pytest has of the test's parameters; those of its fixtures come before.
    """
    marks = list(item.iter_markers_with_node("slow"))
    own = [mark for node, mark in marks if node is item]
    if own or item.get_closest_marker("always") is not None:
        return own[-1] if own else None
    return marks[0][1] if marks else None


def select(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the slow tests that do not run, and with `--slow only` all others.

    Raises: pytest.UsageError for a slow test without a known group.
    """
    runs, option = config.stash[CHOSEN], config.getoption("--slow")
    kept, out = [], []
    for item in items:
        marker = mark_of(item)
        if marker is None:
            (out if option == "only" else kept).append(item)
            continue
        if len(marker.args) != 1 or marker.args[0] not in SOURCES:
            raise pytest.UsageError(f"{item.nodeid}: slow needs a group, one of {', '.join(SOURCES)}")
        (kept if marker.args[0] in runs or name_of(item.path) in runs else out).append(item)
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = kept


PARTIAL = (
    *("keyword", "markexpr", "collectonly", "lf", "stepwise", "deselect", "ignore", "ignore_glob"),
    *("setuponly", "setupplan"),
)
"""Options of pytest by which a run leaves out tests, or all of them."""


def own_overrides(config: pytest.Config) -> set[str]:
    """Return what pytest makes of the project's own options, `--strict-markers` and the like, as if given by `-o`."""
    return {f"{option.removeprefix('--').replace('-', '_')}=true" for option in config.getini("addopts")}


def record(config: pytest.Config, exitstatus: int) -> None:
    """Write the hashes where all slow tests have passed on these sources, now or (`changed`) before: at the end of a
    whole run without a failure."""
    is_worker = hasattr(config, "workerinput")
    is_whole = config.args == config.getini("testpaths") and not any(config.getoption(name, None) for name in PARTIAL)
    is_whole = is_whole and own_overrides(config).issuperset(config.getoption("override_ini") or ())
    if not is_worker and is_whole and exitstatus == 0 and config.getoption("--slow") in WHOLE:
        PROVEN.write_text(json.dumps(config.stash[HASHES], indent=2, sort_keys=True) + "\n")
