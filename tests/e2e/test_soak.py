"""Mixed requests to a server, each as alone; nothing of them is left. The whole load: `python -m benchmarks.soak`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.http import DEADLINE_S
from tests.e2e.rig import CHECKPOINT, EXAMPLES

pytestmark = [pytest.mark.engine, pytest.mark.slow("load"), pytest.mark.xdist_group("server")]

MINUTES = 6
WHOLE_S = 60 * MINUTES + 2 * DEADLINE_S
"""With the server's start, and each request alone, before those minutes."""


@pytest.mark.parametrize("model", ["llada", "sdar"])
def test_a_mixed_load_changes_no_answer_and_leaves_nothing(tmp_path: Path, model: str) -> None:
    checkpoint = CHECKPOINT if model == "llada" else EXAMPLES / "tiny_sdar/checkpoint"
    command = [sys.executable, "-m", "benchmarks.soak", "--model", str(checkpoint), "--log", str(tmp_path / "log")]
    command += ["--count", "600", "--requests", "120", "--minutes", str(MINUTES), "--in-flight", "32"]
    command += ["--max-model-len", "256", "--growth", "1"]
    command += ["--speculative-config", json.dumps({"method": "spiffy", "budget": 3})]
    command += ["--additional-config", json.dumps({"dllm": {"block_length": 8}}), "--num-gpu-blocks-override", "40"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WHOLE_S, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    counts = json.loads(done.stdout.splitlines()[-1])["outcomes"]
    assert counts["answered"] > 400
    assert counts["refused"] > 10
