"""What is wrong ends as one line and exit status 2, before anything is measured."""

import runpy
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.modes import compare_modes
from tests.e2e.wedlm import make_wild
from vllm_dllm.errors import ConfigError
from vllm_dllm.measure.workload import Workload

WORKLOAD = ("--prompts", "prompts.jsonl", "--model")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("reference", *WORKLOAD, "/nope"), "model '/nope' is not there: no such folder"),
        (("stages", *WORKLOAD, "/nope"), "model '/nope' is not there: no such folder"),
        (("modes", *WORKLOAD, "/nope"), "model '/nope' is not there: no such folder"),
        (("kernels", "--out", "no/k.md"), "--out is 'no/k.md', but there is no folder"),
        (("kernels", "--out", "."), "--out is '.', but this is a folder"),
    ],
)
def test_what_is_wrong_is_told_at_once(words, part, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text('{"text": "a"}\n')
    monkeypatch.setattr(sys, "argv", ["benchmarks", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    assert (ended.value.code, out, err.count("\n")) == (2, "", 2), err
    assert part in err


def test_a_model_of_one_mode_has_none_to_compare():
    llada = Path(__file__).parents[2] / "examples/tiny_llada/checkpoint"
    with pytest.raises(ConfigError, match="model is LLaDAModelLM, which has one mode"):
        compare_modes(Workload(str(llada), ((5,),)), ())


@pytest.mark.parametrize("name", ["across", "ceiling", "drafting", "reach", "tokens"])
@pytest.mark.parametrize("content", [None, b"", b"\xff", b"[]", b"{}"])
def test_what_is_no_traces_file_is_told_at_once(name, content, tmp_path, monkeypatch, capsys):
    path = tmp_path / "graph.json.traces"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setattr(sys, "argv", [name, str(path)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"benchmarks.ablations.{name}", run_name="__main__")
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert "give one that `vllm-dllm calibrate --keep-traces` left" in err


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("stages",), "stages are of the steps within a block; allowed are models with blocks"),
        (("accuracy",), "replies are judged under each policy; allowed are models with blocks"),
        (("modes",), "which has one mode"),
        (("reference", "--policy", "static"), "--policy is 'static', but windows that slide"),
    ],
)
def test_what_windows_do_not_have_is_told_before_an_engine_starts(words, part, tmp_path, monkeypatch, capsys):
    make_wild(tmp_path / "wedlm", has_biases=False)
    questions = Path(__file__).parents[2] / "examples/tiny_llada/questions.jsonl"
    given = ("--prompts", str(questions), "--model", str(tmp_path / "wedlm"))
    monkeypatch.setattr(sys, "argv", ["benchmarks", *words, *given])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert part in " ".join(capsys.readouterr().err.split())
