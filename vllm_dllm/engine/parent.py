"""An engine core ends when the process that started it has ended."""

import logging
import multiprocessing
import os
import signal
from multiprocessing.connection import wait
from threading import Thread

logger = logging.getLogger("vllm.dllm")


def end_with_parent() -> None:
    """Let this process, if it is vLLM's engine core, receive SIGTERM when its parent is gone, however that ended.

    vLLM's workers watch the engine core, but nobody watches the script or server that is the engine core's parent:
    where that is killed, or ends by a signal that it does not handle, the others would stay.
    """
    parent = multiprocessing.parent_process()
    if parent is None or not multiprocessing.current_process().name.startswith("EngineCore"):
        return  # the scheduler is in the caller's own process

    def watch() -> None:
        wait([parent.sentinel])
        logger.warning("The process that started this engine core has ended: ending, too")
        os.kill(os.getpid(), signal.SIGTERM)

    Thread(target=watch, daemon=True, name="ParentMonitor").start()
