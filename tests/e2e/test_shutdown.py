"""A script that is killed leaves no process of its engine."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.e2e.http import assert_all_end, wait_until
from tests.e2e.rig import CHECKPOINT

pytestmark = [pytest.mark.engine, pytest.mark.slow("ranks"), pytest.mark.xdist_group("both cores")]

SCRIPT = """
import sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    llm = LLM(sys.argv[1], dtype="float32", max_model_len=128, max_num_seqs=4, kv_cache_memory_bytes=32 << 20,
              tensor_parallel_size=2)
    print("READY", flush=True)
    while True:
        llm.generate(["61 + 27 = ?"] * 4, SamplingParams(max_tokens=64, ignore_eos=True), use_tqdm=False)
"""


def test_a_script_that_is_killed_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    script, log = tmp_path / "script.py", tmp_path / "log"
    script.write_text(SCRIPT)
    with log.open("w") as stream:
        run = subprocess.Popen([sys.executable, script, CHECKPOINT], stdout=stream, stderr=subprocess.STDOUT)
    try:
        wait_until(lambda: "READY" in log.read_text() or run.poll() is not None)
        assert run.poll() is None, log.read_text()[-3000:]
        processes = psutil.Process(run.pid).children(recursive=True)
        assert len(processes) >= 3, log.read_text()[-3000:]  # the engine core and its workers
    finally:
        run.kill()
        run.wait()
    assert_all_end(processes)
