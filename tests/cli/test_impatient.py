"""What an impatient user gives to a command ends as one line, a next command and status 2, before anything slow."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from vllm_dllm import __version__
from vllm_dllm.cli import main

EXAMPLES = Path(__file__).parents[2] / "examples"
MODEL, GRAPH = EXAMPLES / "tiny_llada/checkpoint", EXAMPLES / "tiny_llada/graph.json"
DECODE = ("bench", "decode", "--prompts", "prompts.jsonl", "--model")
CALIBRATE = ("calibrate", "--prompts", "prompts.jsonl")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    Path("prompts.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    Path("file").write_text("{")
    for name, config in {"broken": "{", "list": "[]", "other": json.dumps({"architectures": ["LlamaModel"]})}.items():
        Path(name).mkdir()
        Path(name, "config.json").write_text(config)
    Path("empty").mkdir()
    Path("no_tokenizer").mkdir()
    Path("no_tokenizer/config.json").write_text((MODEL / "config.json").read_text())


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["vllm-dllm", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main.main()
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


MODELS = [
    ("/nope", "model '/nope' is not there: no such folder"),
    ("./emtpy", "; did you mean 'empty'?"),
    ("no-such/model", "there is no folder of this name, and the hub does not give it"),
    ("file", "is a file; allowed are folders"),
    ("/dev/null", "is a file; allowed are folders"),
    ("", "; allowed are folders of checkpoints and names on the hub; give the name or the path of a checkpoint"),
    ("./flie", "no such folder; give the name or the path of a checkpoint"),
    ("empty", "the configuration of model 'empty' cannot be read (config.json in this folder: No such file"),
    ("broken", "the configuration of model 'broken' cannot be read"),
    ("list", "is no JSON object"),
    ("other", "has architectures ['LlamaModel'], allowed are LLaDAModelLM"),
]


@pytest.mark.parametrize(("model", "part"), MODELS)
@pytest.mark.parametrize("command", ["decode", "calibrate", "check"])
def test_a_model_that_cannot_be_read(command: str, model: str, part: str, monkeypatch: Any, capsys: Any) -> None:
    words: dict[str, tuple[object, ...]] = {
        "decode": (*DECODE, model),
        "calibrate": (*CALIBRATE, model, "-o", "graph.json"),
        "check": ("graph", "check", GRAPH, "--model", model),
    }
    status, out, err = run(monkeypatch, capsys, *words[command])
    assert (status, out, err.count("\n"), err.count("\nnext: ")) == (2, "", 2, 1), err
    assert part in err


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ((*CALIBRATE, MODEL, "-o", "no/graph.json"), "--output is 'no/graph.json', but there is no folder"),
        ((*CALIBRATE, MODEL, "-o", "."), "--output is '.', but this is a folder"),
        ((*CALIBRATE, MODEL, "-o", "/proc/graph.json"), "--output is in /proc, where no file can be written"),
        ((*CALIBRATE, MODEL, "-o", "g.json", "--picture", "no/g.svg"), "--picture is 'no/g.svg', but there is no fold"),
        ((*DECODE, MODEL, "--out", "file"), "--out is 'file', but no folder can be made there"),
        ((*DECODE, MODEL, "--out", "/proc/x"), "--out is '/proc/x', but no folder can be made there"),
        (("graph", "merge", GRAPH, "-o", "no/g.json"), "--output is 'no/g.json', but there is no folder"),
        (("graph", "show", GRAPH, "--picture", "no/g.svg"), "--picture is 'no/g.svg', but there is no folder"),
        (("graph", "show", GRAPH, "--picture", "g.pdf"), "--picture is 'g.pdf'; allowed are paths that end in"),
        (("graph", "show", "file"), "file is not JSON"),
        (("graph", "show", "empty"), "empty is a folder; give the path of a graph file"),
        (("graph", "show", "./empty/"), "empty is a folder; give the path of a graph file"),
        (("graph", "show", "/dev/null"), "/dev/null is not a file; give the path of a graph file"),
        ((*DECODE, MODEL, "--graph", "empty"), "empty is a folder; give the path of a graph file"),
        (("graph", "show", "prompts.json"), "prompts.json is not a file; did you mean 'prompts.jsonl'?"),
        (
            (*DECODE, MODEL, "--gen-length", 100_000),
            "--gen-length is 100000, but the model has room for 256 tokens, in blocks of 32, and a prompt takes",
        ),
        (
            (*CALIBRATE, MODEL, "-o", "g.json", "--gen-length", 225),
            "in blocks of 32, and a prompt takes 1 of it; allowed are 1..224; choose a smaller one",
        ),
        ((*DECODE, "no_tokenizer"), "the tokenizer of model 'no_tokenizer' cannot be read"),
        ((*DECODE, "no_tokenizer", "--policy", "statik"), "--policy is 'statik', allowed are"),
        ((*DECODE, "no_tokenizer", "--graph", "a.json"), "a.json is not a file"),
        ((*DECODE, "no_tokenizer", "--budgets", "a"), "--budgets is 'a', allowed are"),
        ((*DECODE, MODEL, "--dtype", "float31"), "'float31' is not one of"),
        ((*CALIBRATE, MODEL, "-o", "g.json", "--dtype", "fp16"), "'fp16' is not one of"),
        (
            (*CALIBRATE, MODEL, "-o", "g.json", "--polcy", "static"),
            "No such option: --polcy (Possible options: --policy)",
        ),
        (("docter",), "Did you mean 'doctor'?"),
        (("graph", "chek"), "Did you mean 'check'?"),
    ],
)
def test_what_is_wrong_is_told_at_once(words: tuple[object, ...], part: str, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    status, out, err = run(monkeypatch, capsys, *words)
    assert (status, out) == (2, "")
    assert part in err
    assert "Traceback" not in err


def test_nothing_slow_is_loaded_before_outputs_and_models_are_checked() -> None:
    import subprocess

    code = (
        "import sys; from vllm_dllm.cli import main\n"
        "try: main.main()\n"
        "except SystemExit as end: print(end.code, sorted({'torch', 'vllm', 'transformers'} & set(sys.modules)))"
    )
    for words in [(*CALIBRATE, MODEL, "-o", "no/graph.json"), (*CALIBRATE, "/nope", "-o", "graph.json")]:
        command = [sys.executable, "-c", code, *map(str, words)]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "2 []\n"


def test_the_version_and_the_short_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, capsys, "--version") == (0, f"vllm-dllm {__version__}\n", "")
    for words in [("-h",), ("graph", "-h"), ("bench", "decode", "-h")]:
        status, out, _ = run(monkeypatch, capsys, *words)
        assert (status, "Usage: vllm-dllm" in out) == (0, True)


def test_doctor_says_what_it_waits_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, err = run(monkeypatch, capsys, "doctor")
    assert "torch" in out
    assert err.splitlines()[0] == "importing torch ..."
