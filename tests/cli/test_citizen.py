"""The program as others expect one: help with examples, completion, errors that say what to run next."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from tests.test_docs import parse
from vllm_dllm.cli import inputs
from vllm_dllm.cli.main import app, main
from vllm_dllm.errors import ConfigError

PROGRAM = Path(sys.executable).with_name("vllm-dllm")


def commands(found: Any, *names: str) -> list[tuple[str, Any]]:
    below = getattr(found, "commands", None)
    if below is None:
        return [(" ".join(names), found)]
    return [each for name, command in below.items() for each in commands(command, *names, name)]


COMMANDS = commands(typer.main.get_command(app), "vllm-dllm")


@pytest.mark.parametrize(("name", "command"), COMMANDS, ids=[name for name, _ in COMMANDS])
def test_help_ends_with_examples_that_are_accepted(name: str, command: Any) -> None:
    heading, *examples = command.epilog.split("\n\n")
    assert heading == "Examples:"
    for example in examples:
        assert example.startswith(f"{name} ") or example == name
        parse(f"{example} ")


def complete(words: str) -> list[str]:
    environment = os.environ | {
        "_VLLM_DLLM_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    done = subprocess.run([PROGRAM], env=environment, capture_output=True, text=True, check=False)
    return done.stdout.split()


def test_shells_complete_commands_options_and_policies() -> None:
    assert complete("vllm-dllm cal") == ["calibrate"]
    assert complete("vllm-dllm graph ") == ["show", "check", "merge"]
    assert complete("vllm-dllm calibrate MODEL --pro") == ["--prompts"]
    assert complete("vllm-dllm calibrate MODEL --policy entropy") == ["entropy", "entropy_bounded", "entropy_threshold"]


@pytest.mark.parametrize(
    ("words", "next_"),
    [
        (["graph", "show", "nosuch.json"], "vllm-dllm calibrate --help"),
        (["graph", "check", "nosuch.json"], "vllm-dllm calibrate --help"),
        (["calibrate", "./nosuch", "--prompts", "nosuch.jsonl", "-o", "graph.json"], "vllm-dllm calibrate --help"),
        (["graph", "merge", "a.json", "-o", "new folder/b.json"], "mkdir -p '{}/new folder'"),
        (["bench", "decode", "--model", "./nosuch", "--prompts", "p.jsonl"], "vllm-dllm bench decode --help"),
    ],
)
def test_errors_end_with_the_command_to_run_next(
    words: list[str],
    next_: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["vllm-dllm", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    message, command = capsys.readouterr().err.splitlines()
    assert message
    assert command == f"next: {next_.format(tmp_path)}"
    assert ended.value.code == (1 if words[1] == "check" else 2)


def test_what_is_missing_is_installed_by_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError) as found:
        inputs.check_matplotlib()
    assert found.value.command == "pip install 'vllm-dllm[tools]'"
