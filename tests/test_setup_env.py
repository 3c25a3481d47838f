"""`scripts/setup_env.sh` says at once what a bare machine lacks, and what to install, before it downloads anything."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tree import ROOT

FAKE = """#!/bin/sh
case "$2" in *{missing}*) exit 1;; esac
exec "{python}" "$@"
"""
"""A Python in which what names a word fails."""


def set_up(folder: Path, missing: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run it in a folder of its own, with a Python that lacks something."""
    folder /= "a föreign folder"
    (folder / "scripts").mkdir(parents=True)
    script = shutil.copy(ROOT / "scripts/setup_env.sh", folder / "scripts")
    python = folder / "a python"
    python.write_text(FAKE.format(missing=missing, python=sys.executable))
    python.chmod(0o755)
    variables = {"PATH": "/usr/bin:/bin", "PYTHON": str(python), "CXX": "true"} | environment
    return subprocess.run([script, "venv"], capture_output=True, text=True, check=False, env=variables)


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
    done = set_up(tmp_path, missing, **environment)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("setup: ")
    assert said in done.stderr
    assert not (tmp_path / "a föreign folder/.venv").exists()


def test_nothing_is_missing(tmp_path: Path) -> None:
    done = set_up(tmp_path, "nothing")
    assert (done.returncode, done.stderr) == (0, "")
    pip = subprocess.run([tmp_path / "a föreign folder/.venv/bin/pip", "--version"], capture_output=True, check=False)
    assert pip.returncode == 0, pip.stderr
