"""What `vllm-dllm doctor` says of other plugins of the same vLLM, and of the variable that forbids our model runner."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from vllm_dllm.cli.console import waiting_for
from vllm_dllm.cli.finding import Finding
from vllm_dllm.engine.neighbours import GENERAL, MARK, PLATFORMS, VARIABLE, others

TIMEOUT_S = 120

WITHOUT = "export VLLM_PLUGINS=dllm"
"""Lets vLLM load ours alone."""


def model_runner() -> Finding:
    """Look whether the environment forbids the runner that serves our models."""
    value = os.environ.get(VARIABLE)
    if value is not None and value.strip().lower() in ("0", "false"):
        text = f"{VARIABLE} is {value!r}, which forbids the one that serves our models: `unset {VARIABLE}`"
        return Finding("model runner", text, "broken")
    return Finding("model runner", "V2, which vLLM takes for our models")


def neighbours() -> Iterator[Finding]:
    """Name the other plugins, and those that keep our models from being served."""
    if not others(GENERAL) and not others(PLATFORMS):
        return
    with waiting_for("loading the other plugins of vLLM"):
        command = [sys.executable, "-m", "vllm_dllm.engine.neighbours"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired:
            yield Finding("other plugins", f"were not loaded in {TIMEOUT_S} s; without them: `{WITHOUT}`", "missing")
            return
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            yield _finding(json.loads(line.removeprefix(MARK)))
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["without a word"])[-1]
        text = f"end the process that loads them ({last}); leave them out: `{WITHOUT}`"
        yield Finding("other plugins", text, "broken")


def _finding(found: dict[str, Any]) -> Finding:
    where, changes = f"{found['name']!r} of {found['distribution']}", "; ".join(found["changes"])
    if changes:
        text = f"{where} changes {changes}; our models cannot be served beside it; leave it out: `{WITHOUT}`"
        return Finding("other plugin", text, "broken")
    if found["error"] is not None:
        text = f"{where} does not load ({found['error']}), and vLLM goes on without it; leave it out: `{WITHOUT}`"
        return Finding("other plugin", text, "missing")
    return Finding("other plugin", f"{where} changes nothing that our models need")
