"""`make demo`'s script runs, its answers are right and its figures are there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine

DEMO = Path(__file__).parents[2] / "examples/demo.py"


def test_demo_answers_and_measures() -> None:
    done = subprocess.run([sys.executable, str(DEMO)], capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert len(re.findall(r"-> .* right$", done.stdout, re.MULTILINE)) >= 5
    rows = re.findall(r"(\d+)/(\d+) +([\d.]+) +([\d.]+) +([\d.]+)%", done.stdout)
    assert len(rows) == 3
    assert int(rows[0][0]) >= 0.9 * int(rows[0][1])
    assert float(rows[2][3]) < float(rows[0][3]), "the threshold policy takes fewer forwards per token"
