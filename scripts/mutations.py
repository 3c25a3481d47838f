"""Try the mutations of tests/suite/mutations.toml: single changes of delicate lines, each of which must fail its test.

Each change is made in a copy of the checkout, so the checkout itself stays as it is. First the named tests must pass
without a change. Exit status 1 where a changed copy passes, or no test ran.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIST = ROOT / "tests/suite/mutations.toml"
EXTENSION = "vllm_dllm/_C.so"
PASSED, FAILED = 0, 1  # of pytest; other exit codes say that no test ran


@dataclass(frozen=True)
class Mutation:
    """A change of one file that a test must notice."""

    change: str
    file: str  # from the root of the repository
    old: str  # occurs once in it
    new: str
    test: str  # FILE::NAME, of all its parameters

    @property
    def is_unit(self) -> bool:
        """Whether the test starts no engine."""
        return not self.test.startswith("tests/e2e/")

    def apply(self, text: str) -> str:
        """Return the file's changed text.

        Raises: ValueError unless `old` occurs once.
        """
        count = text.count(self.old)
        if count != 1:
            raise ValueError(f"{self.change}: {self.old!r} occurs {count} times in {self.file}; it must be there once")
        return text.replace(self.old, self.new)


def load_mutations() -> list[Mutation]:
    """Return the list, in its order."""
    return [Mutation(**row) for row in tomllib.loads(LIST.read_text())["mutation"]]


def copy_checkout(target: Path) -> None:
    """Copy what git tracks or would track, and the built ops."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    for name in [*names, EXTENSION]:
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def run_tests(copy: Path, tests: Iterable[str], timeout_s: float) -> int | None:
    """Run tests in a copy, with what they print going to `pytest.log` there; None where they do not end in time."""
    # A module compiled before a change of the same length within the same second would be taken for the new one.
    environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-n",
        "0",
        "--slow",
        "engines,cases",
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    with (copy / "pytest.log").open("w") as log:
        process = subprocess.Popen(
            [*command, *tests], cwd=copy, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            return process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def imported_from(copy: Path) -> Path:
    """Return where tests that run in a copy find the package."""
    command = [sys.executable, "-c", "import vllm_dllm; print(vllm_dllm.__file__)"]
    environment = os.environ | {"PYTHONPATH": str(copy)}
    found = subprocess.run(command, cwd=copy, env=environment, check=True, capture_output=True, text=True)
    return Path(found.stdout.strip()).parent.parent


def try_mutation(mutation: Mutation, copy: Path, timeout_s: float) -> str | None:
    """Return how the test noticed a change; None where it did not.

    Raises: RuntimeError where no test ran.
    """
    file = copy / mutation.file
    text = file.read_text()
    file.write_text(mutation.apply(text))
    try:
        code = run_tests(copy, [mutation.test], timeout_s)
    finally:
        file.write_text(text)
    if code is None:
        return f"no answer in {timeout_s:.0f} s"
    if code not in {PASSED, FAILED}:
        raise RuntimeError(f"pytest {mutation.test} ended with {code}:\n{(copy / 'pytest.log').read_text()}")
    return "failed" if code == FAILED else None


def main() -> int:
    """Try what the command line chooses, and say how each ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unit", action="store_true", help="only those whose test starts no engine")
    parser.add_argument("-k", default="", metavar="TEXT", help="only those with TEXT in the change, file or test")
    parser.add_argument("--timeout", type=float, default=300, metavar="S", help="of a test; beyond it counts as failed")
    options = parser.parse_args()
    chosen = [
        mutation
        for mutation in load_mutations()
        if (mutation.is_unit or not options.unit) and options.k in f"{mutation.change} {mutation.file} {mutation.test}"
    ]
    if not chosen:
        parser.error("no mutation is chosen")
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        copy = Path(folder).resolve()
        copy_checkout(copy)
        if imported_from(copy) != copy:
            print(f"the tests would import {imported_from(copy)}, not the copy in {copy}")
            return 1
        if run_tests(copy, sorted({mutation.test for mutation in chosen}), options.timeout * 4) != PASSED:
            print(f"the tests fail without a change:\n{(copy / 'pytest.log').read_text()}")
            return 1
        green = 0
        for mutation in chosen:
            begin = time.monotonic()
            how = try_mutation(mutation, copy, options.timeout)
            green += how is None
            seconds = f"{time.monotonic() - begin:.0f} s"
            print(
                f"{'GREEN' if how is None else 'red'}\t{mutation.change}: {mutation.test}, {how or 'passed'}, {seconds}"
            )
            sys.stdout.flush()
    print(f"{len(chosen) - green} of {len(chosen)} changes were noticed")
    return int(green > 0)


if __name__ == "__main__":
    sys.exit(main())
