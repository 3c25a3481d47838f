"""The self-test in a process of its own: who asks survives a kernel that ends it, and has no device to initialise."""

import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from vllm_dllm.attention.choose import IMPLEMENTATIONS
from vllm_dllm.attention.interface import Setting
from vllm_dllm.names import AttentionName
from vllm_dllm.self_test.attention import AttentionShape, check_attention
from vllm_dllm.self_test.check import Check
from vllm_dllm.self_test.decoding import DecodingShape, check_decoding

TIMEOUT_S = 600
"""FlashInfer compiles its kernels at the first call, for minutes."""

NOT_BEGUN = "self-test"
"""Stands for a kernel where the process compared none."""


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be compared."""

    device_type: str  # "cpu" or "cuda": of each kind of GPU the first one
    attention: tuple[AttentionName, AttentionShape] | None = None
    decoding: DecodingShape | None = None


def run(request: Request) -> Iterator[str | Check]:
    """Compare in this process; yields what begins, then what came of it."""
    for device in _devices(request.device_type):
        where = f" on {torch.cuda.get_device_name(device)}" if device.type == "cuda" else f" on {device.type}"
        if request.decoding is not None:
            yield f"native ops{where}"
            yield from check_decoding(request.decoding, device)
        if request.attention is not None:
            name, shape = request.attention
            yield f"attention {name}{where}"
            yield check_attention(name, IMPLEMENTATIONS[name], shape, device)


def run_isolated(request: Request) -> list[Check]:
    """Compare in another process; one that does not end as it should is a check that fails, in place of the rest."""
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    command = [sys.executable, "-m", "vllm_dllm.self_test", "--serve"]
    try:
        done = subprocess.run(
            command, input=pickle.dumps(request), capture_output=True, env=environment, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as late:
        return _read(late.stdout or b"", f"did not end within {TIMEOUT_S} s")
    if done.returncode == 0:
        return _read(done.stdout, None)
    last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
    how = signal.Signals(-done.returncode).name if done.returncode < 0 else f"exit status {done.returncode}"
    return _read(done.stdout, f"ended with {how}: {last}" if last else f"ended with {how}")


def usual_requests() -> Iterator[Request]:
    """Yield what to ask of this machine: native ops, and each implementation that works, at the shapes of 8B models."""
    has_gpu = torch.cuda.is_available()
    device_type, capability = ("cuda", torch.cuda.get_device_capability()) if has_gpu else ("cpu", None)
    dtype = torch.bfloat16
    yield Request(device_type, decoding=DecodingShape(32000, 32, dtype))
    setting = Setting(device_type, capability, dtype, dtype, head_dim=128, page_size=16)
    for name, implementation in IMPLEMENTATIONS.items():
        if implementation.support.refusal(setting) is None and implementation.unavailable(setting) is None:
            for num_kv_heads, block_length in ((32, 32), (8, 4)):  # LLaDA-8B, SDAR-8B
                shape = AttentionShape(32, num_kv_heads, 128, dtype, dtype, 16, block_length, max_len=4096)
                yield Request(device_type, (name, shape))


def _read(output: bytes, failure: str | None) -> list[Check]:
    """Read what the process wrote, and add a check that says how it failed."""
    lines = [json.loads(line) for line in output.splitlines() if line.endswith(b"}")]
    checks = [Check(**line["check"]) for line in lines if "check" in line]
    if failure is not None:
        begun = [line["begins"] for line in lines if "begins" in line]
        checks.append(Check(begun[-1] if begun else NOT_BEGUN, failure, float("nan"), 0.0))
    return checks


def _devices(device_type: str) -> list[torch.device]:
    if device_type == "cpu":
        return [torch.device("cpu")]
    kinds = {torch.cuda.get_device_name(number): number for number in reversed(range(torch.cuda.device_count()))}
    return [torch.device("cuda", number) for number in sorted(kinds.values())]


def serve() -> None:
    """Do what the request on stdin asks for, as the process that `run_isolated` starts."""
    request: Request = pickle.load(sys.stdin.buffer)
    with os.fdopen(os.dup(1), "w") as results:
        os.dup2(2, 1)  # libraries print
        for found in run(request):
            line = {"begins": found} if isinstance(found, str) else {"check": asdict(found)}
            print(json.dumps(line), file=results, flush=True)  # what is there outlives a crash
