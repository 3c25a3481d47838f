"""An engine core hears of its parent's end; another process does not listen."""

import subprocess
import sys
import threading

import psutil

from vllm_dllm.engine.parent import end_with_parent

PROGRAM = """
import multiprocessing, os, time
from vllm_dllm.engine.parent import end_with_parent

def core():
    end_with_parent()
    print(os.getpid(), flush=True)
    time.sleep(600)

if __name__ == "__main__":
    multiprocessing.get_context("fork").Process(target=core, name="EngineCore_DP0").start()
    time.sleep(600)
"""


def test_an_engine_core_ends_with_its_parent() -> None:
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        core = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    _, alive = psutil.wait_procs([core], timeout=60)
    for each in alive:
        each.kill()
    assert not alive


def test_the_process_of_a_script_is_not_watched() -> None:
    end_with_parent()
    assert "ParentMonitor" not in {thread.name for thread in threading.enumerate()}
