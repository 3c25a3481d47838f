"""Every command in the documents has an entry that names a test of it, or says what keeps tests from that."""

import ast
import re
import runpy
import shlex
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.serve_commands import parse_serve
from tests.test_docs import ROOT, code_blocks
from vllm_dllm.draft.graph_file import default_graph, dump_graph

ENTRIES = tomllib.loads((ROOT / "tests/suite/documented_commands.toml").read_text())["commands"]
NEEDS = ("gpu", "nvcc", "hub", "network", "itself", "minutes", "hours", "another", "a container builder", "a shell")
SERVE = re.compile(r"(?:\w+=\S+ )*vllm serve ")


def commands() -> list[str]:
    """The commands of all pages: lines with their continuations, with what a quotation goes on over."""
    found = []
    for _, code in code_blocks("bash", "sh", "console"):
        text = re.sub(r"\\\n\s*", " ", code)
        is_session = re.search(r"^\$ ", text, re.MULTILINE) is not None  # else lines are what the command says
        lines = iter(text.splitlines())
        for line in lines:
            if is_session and not line.startswith("$ "):
                continue
            command = line.removeprefix("$ ")
            while command.count("'") % 2:
                command += f"\n{next(lines)}"
            if command.strip() and not command.startswith("#"):
                found.append(re.sub(r"\s+# .*", "", command).replace("  ", " "))
    return found


COMMANDS = sorted(set(commands()))


def entry_of(command: str) -> dict[str, Any] | None:
    return next((entry for entry in ENTRIES if re.fullmatch(entry["pattern"], command, re.DOTALL)), None)


def names_of(file: Path) -> set[str]:
    return {
        node.name for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }


def test_every_command_has_an_entry() -> None:
    assert len(COMMANDS) > 90
    assert [command for command in COMMANDS if entry_of(command) is None] == []


def test_every_entry_is_of_a_command_and_names_a_test() -> None:
    used = {entry["pattern"] for command in COMMANDS if (entry := entry_of(command))}
    assert [entry["pattern"] for entry in ENTRIES if entry["pattern"] not in used] == []
    for entry in ENTRIES:
        assert ("by" in entry) != ("needs" in entry), entry
        if "needs" in entry:
            assert entry["needs"].startswith(NEEDS), entry
            continue
        file, *names = entry["by"].split("::")
        assert set(names) <= names_of(ROOT / file), entry


def test_vllm_takes_every_command_that_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "graph.json").write_text(dump_graph(default_graph("threshold")))
    (tmp_path / "spiffy.json").write_text('{"method": "spiffy", "draft_graph": "graph.json"}')
    (tmp_path / "server.yaml").write_text("speculative-config: spiffy.json\n")
    serving = [SERVE.sub("", command) for command in COMMANDS if SERVE.match(command)]
    assert len(serving) > 30
    for command in serving:
        parse_serve(shlex.split(command))


def test_random_models_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["random_models", str(tmp_path)])
    runpy.run_module("tests.e2e.random_models", run_name="__main__")
    configs = sorted(path.parent.name for path in tmp_path.glob("*/config.json"))
    assert configs == ["dream", "fast_dllm", "llada", "nemotron", "sdar"]
