"""The tests of kernels in a process with another instruction set; all other tests run with the best of the machine."""

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
FILES = ("test_draft_graph_attention.py", "test_vocab_stats.py", "test_vocab_stats_sampled.py")
NUMERIC = "equals_torch or alone_equals or errors or bound or companions or missing or kept"
"""The tests that compare numbers and bits."""


def run_tests(isa: str, library: Path | None = None) -> str:
    """Run them; returns their report, or "" where the machine lacks the instruction set.

    Args:
        isa: the instruction set.
        library: a build of the ops, by default the one of this environment.

    Raises: AssertionError for a test that fails.
    """
    environment = os.environ | {"VLLM_DLLM_ISA": isa}
    if library is not None:
        environment["VLLM_DLLM_LIBRARY"] = str(library)
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", NUMERIC]
    command = [sys.executable, "-m", "pytest", *options, *(str(FOLDER / file) for file in FILES)]
    done = subprocess.run(command, cwd=FOLDER.parents[1], env=environment, capture_output=True, text=True, check=False)
    if "this machine allows" in done.stdout:
        return ""
    assert done.returncode == 0, done.stdout
    return done.stdout
