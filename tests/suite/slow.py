"""The tests marked `slow(group)`, and when a run may leave them out.

`slow.json` holds for each group a hash of its sources, written where all slow tests passed on them (`make test-all`).
With `--slow changed`, as in CI, a group runs unless its sources are still the same; the header of the run says which.
"""

import hashlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROVEN = Path(__file__).with_name("slow.json")
CHOICES = ("none", "changed", "only", "all")

SOURCES: dict[str, tuple[str, ...]] = {
    "answers": (
        *("vllm_dllm/draft/**", "vllm_dllm/unmask/**", "vllm_dllm/denoiser.py", "vllm_dllm/models/**"),
        *("examples/tiny_llada/**", "examples/quantise.py", "tests/e2e/test_quantised.py"),
    ),
    "bench": (
        *("vllm_dllm/measure/**", "vllm_dllm/engine/measuring.py", "vllm_dllm/cli/*bench*.py", "benchmarks/*.py"),
        *("tests/measure/**", "tests/e2e/test_bench.py"),
    ),
    "configurations": (
        *("vllm_dllm/engine/**", "vllm_dllm/models/**", "vllm_dllm/state/**", "vllm_dllm/attention/**"),
        *("vllm_dllm/denoiser.py", "vllm_dllm/draft/**", "vllm_dllm/unmask/**", "vllm_dllm/ops/**"),
        *("csrc/bindings/**", "csrc/cpu/**", "csrc/include/**"),
    ),
    "demo": ("examples/**", "vllm_dllm/studio/**", "requirements/serve.txt", "tests/e2e/test_demo.py"),
    "examples": (
        *("examples/*.py", "examples/*.sh", "vllm_dllm/cli/**", "vllm_dllm/spiffy_config.py"),
        *("vllm_dllm/engine/front_end.py", "tests/e2e/test_examples.py"),
    ),
    "fields": ("vllm_dllm/models/**", "vllm_dllm/reference/**", "tests/models/*"),
    "fuzz": (
        *("vllm_dllm/config.py", "vllm_dllm/engine/request.py", "tests/e2e/test_spiffy_config.py"),
        *("vllm_dllm/constraint/**", "vllm_dllm/engine/structured.py", "benchmarks/constraint_fuzz.py"),
        *("benchmarks/fuzz/**", "tests/e2e/test_structured.py"),
    ),
    "isas": (
        *("CMakeLists.txt", "MANIFEST.in", "pyproject.toml", "setup.py", "vllm_dllm/ops/**"),
        *("csrc/bindings/**", "csrc/cpu/**", "csrc/include/**", "tests/ops/*", "tests/test_wheel.py"),
    ),
    "load": (
        *("vllm_dllm/engine/**", "vllm_dllm/state/**", "vllm_dllm/constraint/**", "vllm_dllm/unmask/**"),
        *("benchmarks/soak.py", "benchmarks/fuzz/**", "tests/e2e/test_soak.py"),
    ),
    "operator": (
        *("vllm_dllm/engine/**", "vllm_dllm/plugin.py", "docs/operate.md"),
        *("tests/e2e/http.py", "tests/e2e/test_operator.py"),
    ),
    "statements": (
        *(
            "vllm_dllm/unmask/**",
            "vllm_dllm/draft/**",
            "vllm_dllm/denoiser.py",
            "vllm_dllm/apart.py",
            "vllm_dllm/noise.py",
        ),
        *(
            "csrc/bindings/**",
            "csrc/cpu/**",
            "csrc/include/**",
            "tests/statements/*.py",
            "examples/tiny_*/checkpoint/*",
        ),
    ),
    "readme": ("README.md", "tests/e2e/test_readme.py"),
}
"""What each group tests that no other test does: files, as globs in the repository."""

BUILT = {".so", ".pyc"}


def files_of(group: str) -> list[Path]:
    """Return the files of a group, in order.

    Raises: ValueError for a glob that matches nothing.
    """
    files: set[Path] = set()
    for pattern in SOURCES[group]:
        # "**" matches folders alone before Python 3.13.
        found = {path for path in ROOT.glob(pattern + "/*" if pattern.endswith("**") else pattern) if path.is_file()}
        if not found:
            raise ValueError(f"the slow group {group!r} has the sources {pattern!r}, which match no file")
        files |= {path for path in found if path.suffix not in BUILT}
    return sorted(files)


def hash_of(group: str) -> str:
    """Hash the names and contents of a group's sources."""
    digest = hashlib.sha256()
    for path in files_of(group):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(ROOT).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:32]


def proven() -> dict[str, str]:
    """Return the hashes that the slow tests last passed with; a file that is no JSON proves nothing."""
    try:
        found: dict[str, str] = json.loads(PROVEN.read_text())
    except (OSError, ValueError):
        return {}
    return found


def chosen(option: str, hashes: dict[str, str]) -> dict[str, str]:
    """Return each group that runs, and why."""
    if option in {"all", "only"}:
        return dict.fromkeys(hashes, "asked for")
    before = proven()
    return {
        group: "its sources changed" if group in before else "it has not passed before"
        for group, value in hashes.items()
        if before.get(group) != value
    }


HASHES = pytest.StashKey[dict[str, str]]()
CHOSEN = pytest.StashKey[dict[str, str]]()


def configure(config: pytest.Config) -> None:
    """Hash the sources as they are when the run begins."""
    option = config.getoption("--slow")
    config.stash[HASHES] = {} if option == "none" else {group: hash_of(group) for group in SOURCES}
    config.stash[CHOSEN] = chosen(option, config.stash[HASHES])


def header(config: pytest.Config) -> list[str]:
    """Say for each group whether it runs, and why."""
    runs = config.stash[CHOSEN]
    unchanged = "it passed on these sources (tests/suite/slow.json)"
    left_out = "--slow is none" if config.getoption("--slow") == "none" else unchanged
    reasons = {group: f"run, {runs[group]}" if group in runs else f"left out, {left_out}" for group in SOURCES}
    return [f"slow tests, {group}: {reason}" for group, reason in reasons.items()]


def select(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the slow tests that do not run, and with `--slow only` all others.

    Raises: pytest.UsageError for a slow test without a known group.
    """
    runs, option = config.stash[CHOSEN], config.getoption("--slow")
    kept, out = [], []
    for item in items:
        marker = item.get_closest_marker("slow")
        if marker is None:
            (out if option == "only" else kept).append(item)
            continue
        if len(marker.args) != 1 or marker.args[0] not in SOURCES:
            raise pytest.UsageError(f"{item.nodeid}: slow needs a group, one of {', '.join(SOURCES)}")
        (kept if marker.args[0] in runs else out).append(item)
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = kept


def record(config: pytest.Config, exitstatus: int) -> None:
    """Write the hashes where all slow tests passed: a whole run, chosen by no name, mark or file, without a failure."""
    is_worker = hasattr(config, "workerinput")
    is_whole = config.args == config.getini("testpaths") and not config.option.keyword and not config.option.markexpr
    if is_worker or not is_whole or exitstatus != 0 or config.option.collectonly:
        return
    if config.getoption("--slow") in {"all", "only"} and HASHES in config.stash:
        PROVEN.write_text(json.dumps(config.stash[HASHES], indent=2, sort_keys=True) + "\n")
