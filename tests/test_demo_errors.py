"""What `make demo` says where it cannot go on: the first error of a server, and a checkout that is read-only."""

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "examples"

PIDS = "(EngineCore pid=71)", "(APIServer pid=9)"
LATER = f"""\
{PIDS[1]} Traceback (most recent call last):
{PIDS[1]}   File "vllm/v1/engine/utils.py", line 983, in wait_for_engine_startup
{PIDS[1]}     raise RuntimeError(
{PIDS[1]} RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {{}}
""" + "".join(f"{PIDS[1]} more {number}\n" for number in range(500))


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(FOLDER))
    return runpy.run_path(str(FOLDER / "demo.py"))


def stamped(text: str) -> str:
    return f"{PIDS[0]} ERROR 11-30 09:20:01 [core.py:1132] {text}"


@pytest.mark.parametrize(
    ("lines", "cause"),
    [
        (
            [
                stamped("EngineCore failed to start."),
                stamped("Traceback (most recent call last):"),
                stamped("    raise ValueError(f'KVError: {x}')"),
                stamped("ValueError: No available memory for 3 pages."),
            ],
            "ValueError: No available memory for 3 pages.",
        ),
        (
            ["(EngineCore pid=71) vllm_dllm.errors.ConfigError: dllm.threshold is 2, allowed are numbers from 0 to 1"],
            "vllm_dllm.errors.ConfigError: dllm.threshold is 2, allowed are numbers from 0 to 1",
        ),
        (
            [f"{PIDS[1]} ERROR 11-30 09:20:01 [x.py:1] OSError: [Errno 98] Address already in use"],
            "OSError: [Errno 98] Address already in use",
        ),
        (
            [
                "pydantic_core._pydantic_core.ValidationError: 2 validation errors for ModelConfig",
                "  Value error, the folder has no config.json [type=value_error, input_type=ArgsKwargs]",
            ],
            "pydantic_core._pydantic_core.ValidationError: 2 validation errors for ModelConfig: "
            "Value error, the folder has no config.json [type=value_error, input_type=ArgsKwargs]",
        ),
        (["usage: vllm serve [model_tag] [options]", "vllm serve: error: unrecognized arguments: --kv"], None),
    ],
)
def test_the_first_error_is_named(demo: dict[str, Any], lines: list[str], cause: str | None) -> None:
    log = "\n".join(["INFO 11-30 09:20:00 [api_server.py:1] version 0.32", *lines, LATER])
    assert demo["first_cause"](log) == (cause or lines[-1])


def test_a_log_without_an_error_names_none(demo: dict[str, Any]) -> None:
    log = f"{PIDS[1]} WARNING 11-30 09:20:00 [a.py:1] Errors like `OSError: Too many open files`.\nKilled\n"
    assert demo["first_cause"](log) is None


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (
            f"print({LATER!r}, flush=True); raise KeyError('the cause')",
            "RuntimeError: Engine core initialization failed.",
        ),
        ("print('Killed')", "did not start (status 0); the end of {log}:\nKilled"),
    ],
)
def test_a_server_that_ends_is_told_with_its_status(
    demo: dict[str, Any], program: str, said: str, tmp_path: Path
) -> None:
    log = tmp_path / "demo.log"
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, "-c", program], stdout=file, stderr=subprocess.STDOUT)
    with pytest.raises(SystemExit) as ended:
        demo["Server"](process, log, "http://127.0.0.1:1").wait_until_ready()
    assert said.format(log=log) in str(ended.value.code)
    assert len(str(ended.value.code).splitlines()) <= 3


def test_a_folder_that_cannot_be_written_is_told_before_anything_starts(demo: dict[str, Any], tmp_path: Path) -> None:
    demo["check_folder"](tmp_path / "build")
    assert list((tmp_path / "build").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(
        SystemExit, match=r"go to .*file/build, which cannot be written \(.*\); use a writable checkout"
    ):
        demo["check_folder"](tmp_path / "file/build")
