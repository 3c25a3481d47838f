"""The scripts for a GPU machine run here: the Python ones on tiny shapes, the stages with a stub toolchain."""

import os
import subprocess
import sys
from dataclasses import replace
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.tree import ROOT

STAGES = {
    "gpu_first.sh": "machine build self_test tests shapes llada sdar memcheck racecheck",
    "gpu_check.sh": ("machine build self_test tests shapes memcheck racecheck initcheck synccheck llada sdar kernels"),
}

PROGRAM = """#!/usr/bin/env bash
call="$(basename "$0") $*"
echo "$call" | tee -a "$CALLS"
if [[ "$call" == *--log-file* ]]; then
  printf '========= COMPUTE-SANITIZER\\n%s\\n' "$FINDINGS" >"$LOGS/$2.findings"
  echo "$PASSES"
fi
if [[ "$call" == *--help ]]; then echo "$HELP"; fi
if [[ "$call" =~ $SLEEPS ]]; then sleep 60; fi
if [[ "$call" =~ $FAILS ]]; then echo "it failed" >&2; exit 3; fi
"""


def load(name: str) -> ModuleType:
    spec = util.spec_from_file_location(name, ROOT / f"scripts/{name}.py")
    assert spec is not None
    module = util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("steps", [["4,2,8,1,2,40", "2,1,4,3,3,70", "2,2,64,0,1,0"]])
def test_attention_at_shapes_is_compared(steps: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert load("gpu_shapes").main(steps) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["ok"] * 9
    assert [line.split(":")[0].rpartition(" ")[2] for line in lines[:3]] == ["eager", "stored", "captured"]


def test_shapes_that_differ_are_an_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = load("gpu_shapes")
    fill = script.CapturedLayout.fill

    def stale(self: Any, host: Any, *args: Any, **sizes: Any) -> Any:
        return fill(self, script.empty_layout(), *args, **sizes)  # as if the graph never saw the new layout

    monkeypatch.setattr(script.CapturedLayout, "fill", stale)
    monkeypatch.setattr(script, "store_kv", lambda *args: None)
    assert script.main(["4,2,8,1,2,40"]) == 1
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["ok", "WRONG", "WRONG"]


def test_a_step_is_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script = load("gpu_step")
    options = "tiny --contexts 40,64 --batches 1,2 --drafts 0,3 --steps 2 --max-model-len 256"
    monkeypatch.setattr(sys, "argv", ["gpu_step.py", *options.split()])
    script.main()
    header, _, *rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert tuple(header) == script.COLUMNS
    assert [row[:5] for row in rows] == [
        ["tiny", str(context), str(batch), str(drafts), str(batch * (1 + drafts) * 8)]
        for context in (40, 64)
        for batch in (1, 2)
        for drafts in (0, 3)
    ]
    assert all(float(ms) > 0 for row in rows for ms in row[5:9])


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_timed_step_is_one_that_serves(is_causal: bool) -> None:
    """Blocks end and begin again, each in as many steps as it has positions or fewer, by drafts that came true."""
    script = load("gpu_step")
    shape = replace(script.SHAPES["tiny"], is_causal=is_causal)
    device = torch.device("cpu")
    with torch.inference_mode():
        model = script.Model(shape, 2 * 8 + 1, device)
        pages = 1 + torch.arange(16).view(2, 8).int()
        engine = script.Engine(model, pages, 64, 3)
        forward, emitted, accepted = engine.forward(), torch.zeros(2), torch.zeros(2)
        for _ in range(17):
            step, _layout = engine.prepare()
            emission = engine.decide(step, forward())
            emitted += emission.num_sampled
            accepted += emission.report[:, 3]
    assert (emitted >= 2 * 8).all()
    assert (emitted % 8 == 0).all()
    assert (accepted > 0).any()


def toolchain(folder: Path) -> dict[str, str]:
    """Make programs that do nothing; returns the environment in which they are found."""
    tools = folder / "tools"
    tools.mkdir()
    for name in ("nvidia-smi", "nvcc", "cmake", "compute-sanitizer", "python3"):
        (tools / name).write_text(PROGRAM)
        (tools / name).chmod(0o755)
    unset = dict.fromkeys(("FAILS", "SLEEPS"), "^$") | {
        "FINDINGS": "",
        "HELP": "--kernel-name arg",
        "PASSES": "test PASSED",
    }
    folders = {"OUT": f"{folder}/out", "LOGS": f"{folder}/logs", "BUILD": f"{folder}/build", "CALLS": f"{folder}/calls"}
    return os.environ | unset | folders | {"PATH": f"{tools}:{os.environ['PATH']}"}


def run_stages(script: str, folder: Path, **environment: str) -> tuple[int, dict[str, str], list[str]]:
    """Run a script with a stub toolchain; returns its exit status, how stages ended, and the programs called."""
    variables, out = toolchain(folder) | environment, folder / "out"
    done = subprocess.run(
        [ROOT / "scripts" / script], env=variables, capture_output=True, text=True, check=False, timeout=60
    )
    summary = (out / "summary.txt").read_text().splitlines()
    ends = dict(line.removeprefix("== ").split(": ", 1) for line in summary[:-1])
    assert summary[-1] == done.stdout.splitlines()[-1]
    logs = {log.stem for log in (folder / "logs").glob("*.log")}
    assert logs == {name for name, end in ends.items() if "not run" not in end}
    assert [line for line in (out / "all.log").read_text().splitlines() if line in summary] == summary[: len(logs)]
    assert {each.name for each in out.iterdir()} == {"summary.txt", "all.log"}, "few files come back from a machine"
    return done.returncode, ends, (folder / "calls").read_text().splitlines()


@pytest.mark.parametrize("script", STAGES)
def test_every_stage_runs(script: str, tmp_path: Path) -> None:
    status, ends, calls = run_stages(script, tmp_path)
    assert status == 0
    assert list(ends) == STAGES[script].split()
    assert {end.split()[0] for end in ends.values()} == {"ok"}
    assert any(call.startswith(f"cmake -S . -B {tmp_path}/build -GNinja") for call in calls)
    assert f"cmake --build {tmp_path}/build --target _C" in calls
    assert "python3 -m pytest -q -p no:cacheprovider --slow cases -m gpu tests/ops" in calls
    for command in ("scripts/gpu_shapes.py", "scripts/gpu_step.py llada", "-m vllm_dllm.self_test"):
        assert any(call.startswith(f"python3 {command}") for call in calls)
    tools = [call for call in calls if call.startswith("compute-sanitizer --tool")]
    assert len(tools) == sum(name.endswith("check") for name in ends)
    assert all(f"--log-file {tmp_path}/logs/" in call and " --kernel-name kns=4dllm4cuda " in call for call in tools)


@pytest.mark.parametrize("script", STAGES)
def test_a_stage_that_fails_stops_no_other(script: str, tmp_path: Path) -> None:
    status, ends, _ = run_stages(script, tmp_path, FAILS=r"^cmake --build|gpu_step.py llada|tool racecheck")
    assert status == 1
    assert list(ends) == STAGES[script].split()
    failed = {name for name, end in ends.items() if end.startswith("FAILED with exit status 3")}
    assert failed == {"build", "llada", "racecheck"}
    assert "it failed" in (tmp_path / "logs/llada.log").read_text()


def test_a_stage_that_does_not_end_is_stopped_and_time_runs_out(tmp_path: Path) -> None:
    status, ends, _ = run_stages("gpu_first.sh", tmp_path, SLEEPS="^cmake --build", SECONDS_IN_ALL="9")
    assert status == 1
    assert ends["build"].startswith("STOPPED after its ")
    assert ends["racecheck"] == "not run, no time is left"


@pytest.mark.parametrize(
    ("findings", "passes", "status", "said"),
    [
        ("", "test PASSED", 0, "found nothing until it was stopped"),
        ("========= Invalid __global__ read of size 4", "test PASSED", 1, "Invalid"),
        ("", "", 1, "no test passed"),
    ],
)
def test_a_sanitizer_that_is_stopped_passes_if_tests_did_and_it_found_nothing(
    findings: str, passes: str, status: int, said: str, tmp_path: Path
) -> None:
    given = {"SLEEPS": "tool memcheck", "FINDINGS": findings, "PASSES": passes, "SECONDS_IN_ALL": "60"}
    variables = toolchain(tmp_path) | given
    code = "source scripts/gpu_stages.sh; stage memcheck 8 sanitize memcheck; finish"
    done = subprocess.run(["bash", "-c", code], cwd=ROOT, env=variables | {"HELP": "--kernel-regex"}, check=False)
    assert done.returncode == status
    assert said in (tmp_path / "logs/memcheck.log").read_text()
    (call,) = [line for line in (tmp_path / "calls").read_text().splitlines() if "--tool" in line]
    assert " --kernel-regex kns=4dllm4cuda " in call


def test_tests_of_the_ops_are_collected_on_a_gpu_machine() -> None:
    """It has torch, numpy, pytest and hypothesis; neither vLLM nor what comes with it."""
    missing = ("vllm", "pydantic", "transformers", "safetensors", "tokenizers", "typer", "rich", "httpx")
    code = (
        f"import sys, pytest; sys.modules.update(dict.fromkeys({missing!r}));"
        "sys.exit(pytest.main(['-q', '--collect-only', '-p', 'no:cacheprovider', '-m', 'gpu', 'tests/ops']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
