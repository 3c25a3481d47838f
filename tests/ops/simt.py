"""The CUDA kernels on a CPU: builds tests/simt and loads its ops, `torch.ops.vllm_dllm_simt.NAME`."""

import fcntl
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.suite.parts import running

ROOT = Path(__file__).parent.parent.parent
WHERE = pytest.param("simt", marks=pytest.mark.slow("kernels"))
"""The emulator as a parameter of tests."""
PLACES = ("cpu", "simt") if "kernels" in running else ("cpu",)
"""Where tests compare an op that have no such parameter."""
BUILD = ROOT / os.environ.get("VLLM_DLLM_SIMT_BUILD", "build/simt")


def tool(name: str) -> str:
    """Find a tool in this environment, then on PATH."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.is_file() else shutil.which(name) or name


@cache
def ops() -> Any:
    """Return the ops, which take CPU tensors."""
    torch.ops.load_library(build("simt") / "_simt.so")
    return torch.ops.vllm_dllm_simt


def build(target: str) -> Path:
    """Build a target where its sources changed, one process at a time; returns the folder that it is in."""
    options = ["-DCMAKE_BUILD_TYPE=Release", "-DDLLM_CUDA=OFF", f"-DTORCH_DIR={torch.__path__[0]}"]
    generator = ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run(tool("cmake"), "-S", str(ROOT), "-B", str(BUILD), *generator, *options)
        run(tool("cmake"), "--build", str(BUILD), "--target", target)
    return BUILD


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
