"""`scripts/setup_env.sh` says at once what a bare machine lacks, and what to install, before it downloads anything."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tree import ROOT

FAKE = """#!/bin/sh
case "$2" in *{missing}*) exit 1;; esac
exec "{python}" "$@"
"""
"""A Python in which what names a word fails."""

NOBODY = 65534


def lay_out(folder: Path, missing: str = "nothing") -> Path:
    """Make a folder of its own with the script, and a Python that lacks something."""
    folder /= "a föreign folder"
    (folder / "scripts").mkdir(parents=True)
    shutil.copy(ROOT / "scripts/setup_env.sh", folder / "scripts")
    python = folder / "a python"
    python.write_text(FAKE.format(missing=missing, python=sys.executable))
    python.chmod(0o755)
    return folder


def set_up(checkout: Path, user: int | None = None, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run it."""
    variables = {"PATH": "/usr/bin:/bin", "PYTHON": str(checkout / "a python"), "CXX": "true"} | environment
    command = [checkout / "scripts/setup_env.sh", "venv"]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=variables, user=user)


@pytest.mark.parametrize(
    ("missing", "environment", "said"),
    [
        ("libnuma", {}, "found no libnuma.so.1, without which vLLM cannot compute on a CPU; install it (Debian: apt"),
        ("ensurepip", {}, "has no venv or no ensurepip, which a virtual environment needs; install them (Debian: apt"),
        ("version_info", {}, "found no Python 3.11, 3.12 or 3.13 (tried: "),
        ("nothing", {"CXX": "no-c++"}, "found no C++ compiler 'no-c++'; install one (Debian: apt install g++)"),
    ],
)
def test_what_is_missing_is_named(missing: str, environment: dict[str, str], said: str, tmp_path: Path) -> None:
    checkout = lay_out(tmp_path, missing)
    done = set_up(checkout, **environment)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("setup: ")
    assert said in done.stderr
    assert not (checkout / ".venv").exists()


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everybody can read, which tmp_path is not."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.parametrize("closed", [".", "vllm_dllm", "packaging/vllm-alias", "build", ".venv"])
def test_a_folder_that_cannot_be_written_is_named(closed: str, open_folder: Path) -> None:
    checkout = lay_out(open_folder)
    checkout.chmod(0o777)
    folder = checkout / closed
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o555)
    before = sorted(checkout.rglob("*"))
    done = set_up(checkout, user=NOBODY if os.geteuid() == 0 else None)  # root writes everywhere
    folder.chmod(0o755)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith(
        f"setup: cannot write to {folder}: .venv, the ops and build/ are made in the checkout"
    )
    assert f"git clone '{checkout}' FOLDER" in done.stderr
    assert sorted(checkout.rglob("*")) == before


def test_nothing_is_missing(tmp_path: Path) -> None:
    checkout = lay_out(tmp_path)
    done = set_up(checkout)
    assert (done.returncode, done.stderr) == (0, "")
    pip = subprocess.run([checkout / ".venv/bin/pip", "--version"], capture_output=True, check=False)
    assert pip.returncode == 0, pip.stderr
