"""`vllm-dllm calibrate` without an engine: what it refuses, how it stops and goes on, what it writes."""

import json
import re

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from tests.calibrate.traces import MASK, random_trace
from vllm_dllm.calibrate.build import WeightsTrial
from vllm_dllm.cli import calibrate as command
from vllm_dllm.cli import server_settings
from vllm_dllm.draft.graph_file import load_graph
from vllm_dllm.draft.graph_schema import ModelShape
from vllm_dllm.draft.ranker_file import load_ranker
from vllm_dllm.errors import ConfigError
from vllm_dllm.unmask.schedule import UnmaskRules

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(command.calibrate)


class FakeFacts:
    family, mask_token_id, eos_token_id, rules = "llada", MASK, 1, UnmaskRules()
    shape = ModelShape(vocab_size=376, hidden_size=128, num_hidden_layers=6)


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"text": f"prompt {i}"}) + "\n" for i in range(8)))
    return path


@pytest.fixture
def decoded(monkeypatch):
    """Replace the engine; the list has the numbers of decoded prompts, and "stop" interrupts before the next one."""
    calls: list = []

    def decode(plan, trace_file):
        for i in range(len(plan.prompts.conversations)):
            if i not in trace_file.traces:
                if "stop" in calls and calls.count("stop") * 3 <= len([c for c in calls if c != "stop"]):
                    raise KeyboardInterrupt
                trace_file.append(random_trace(np.random.default_rng(i), prompt_idx=i))
                calls.append(i)
        return FakeFacts

    monkeypatch.setattr(command, "_decode", decode)
    monkeypatch.setattr(server_settings, "read_config", lambda model: {"architectures": ["LLaDAModelLM"]})
    monkeypatch.setattr(command, "num_positions", lambda model: 512)
    monkeypatch.setattr(command.importlib.metadata, "version", lambda name: "0")
    return calls


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=True)


def options(prompts, output, *more):
    return ["some/model", "--prompts", prompts, "-o", output, "--block-length", 8, "--nodes", 6, *more]


def test_writes_a_graph_with_its_provenance(prompts, decoded, tmp_path):
    output = tmp_path / "graph.json"
    result = run(*options(prompts, output, "--budgets", "1,3", "--temperature", 0))
    assert result.exit_code == 0, result.exception
    assert decoded == list(range(8))
    file = load_graph(output)
    assert file.provenance is not None
    assert len(file.graph) == 6
    assert file.graph.expected is not None
    [said] = re.findall(r"token weights: ([\d.]+) forwards .* ([\d.]+) without: (kept|left out)", result.output)
    assert (said[2] == "kept") == (float(said[0]) < float(said[1])) == (file.graph.tokens is not None)
    assert (file.provenance.model, file.provenance.family) == ("some/model", "llada")
    assert file.provenance.shape == FakeFacts.shape
    assert file.provenance.prompts[0].num_prompts == 8
    nfe = file.provenance.predicted_nfe
    assert sorted(nfe) == [0, 1, 3]
    assert nfe[0] == 16.0
    assert nfe[0] > nfe[1] > nfe[3]
    assert "2 prompts held out" in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["graph.json", "prompts.jsonl"]


def test_trains_a_ranker_beside_the_graph(prompts, decoded, tmp_path):
    output, ranker = tmp_path / "graph.json", tmp_path / "ranker.safetensors"
    result = run(*options(prompts, output, "--ranker", ranker))
    assert result.exit_code == 0, result.exception
    found = re.search(r"comes next at ([\d.]+)% of the held-out steps, ([\d.]+)% with the ranker", result.output)
    assert found
    file, graph = load_ranker(ranker), load_graph(output)
    assert (file.readiness, file.provenance) == (graph.graph.readiness, graph.provenance)
    assert any(weight.any() for name, weight in file.weights.items() if name == "write.weight"), "it was trained"
    names = ["graph.json", "prompts.jsonl", "ranker.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    # Without one the same prompts give another graph: the nodes of this one are those of the ranker's order.
    assert run(*options(prompts, tmp_path / "plain.json")).exit_code == 0
    assert load_graph(tmp_path / "plain.json").graph.counts != graph.graph.counts


def test_stops_and_goes_on(prompts, decoded, tmp_path):
    output = tmp_path / "graph.json"
    decoded.append("stop")
    result = run(*options(prompts, output))
    assert result.exit_code == 130
    assert "stopped after 3 of 8 prompts; the same command goes on from there" in result.stderr
    assert not output.exists()
    decoded.remove("stop")
    assert run(*options(prompts, output)).exit_code == 0
    assert decoded == list(range(8))
    alone = tmp_path / "alone.json"
    assert run(*options(prompts, alone)).exit_code == 0
    assert output.read_text() == alone.read_text()


def test_does_not_go_on_with_other_settings(prompts, decoded, tmp_path):
    output = tmp_path / "graph.json"
    decoded.append("stop")
    run(*options(prompts, output))
    result = run(*options(prompts, output, "--gen-length", 64))
    assert isinstance(result.exception, ConfigError)
    assert "gen-length 256, but now gen-length is 64" in str(result.exception)


def test_a_default_length_fits_the_model_and_a_given_one_has_to(prompts, decoded, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "num_positions", lambda model: 256)
    output = tmp_path / "graph.json"
    assert run(*options(prompts, output, "--keep-traces")).exit_code == 0
    assert json.loads((tmp_path / "graph.json.traces").read_text().split("\n")[0])["settings"]["gen-length"] == 128
    result = run(*options(prompts, tmp_path / "b.json", "--gen-length", 256))
    assert str(result.exception).startswith("--gen-length is 256, but the model has room for 256 tokens")


def test_keeps_traces_and_uses_them_again(prompts, decoded, tmp_path):
    output = tmp_path / "graph.json"
    assert run(*options(prompts, output, "--keep-traces")).exit_code == 0
    before = load_graph(output).graph
    assert run(*options(prompts, output, "--keep-traces", "--objective", "degree-1")).exit_code == 0
    assert decoded == list(range(8))
    assert load_graph(output).graph.formulas != before.formulas


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--policy", "threshold", "--threshold", "2"], "--threshold is 2.0, allowed are numbers above 0 and up to 1"),
        (["--steps-per-block", "9"], "--steps-per-block is 9 but --block-length is 8"),
        (["--policy", "dynamic", "--steps-per-block", "3"], "--steps-per-block is 3, but --policy 'dynamic'"),
        (["--alg-temp", "-1"], "--alg-temp is -1.0, allowed are null and finite numbers from 0 on"),
        (["--budgets", "3,x"], "--budgets is '3,x'; allowed are whole numbers from 1 to 64"),
        (["--budgets", "0"], "--budgets is '0'; allowed"),
        (["--picture", "graph.jpg"], "--picture is 'graph.jpg'; allowed are paths that end in .svg or .png"),
        (["--ranker", "ranker.bin"], "--ranker is ranker.bin, allowed are files whose names end in .safetensors"),
        (["--ranker", "missing/r.safetensors"], "--ranker is 'missing/r.safetensors', but there is no folder"),
        (["--ranker", "r.safetensors", "--policy", "random"], "--ranker is given with policy 'random', whose order"),
        (["-o", "missing/graph.json"], "--output is 'missing/graph.json', but there is no folder"),
    ],
)
def test_refuses_before_it_decodes(prompts, decoded, tmp_path, more, text):
    result = run(*options(prompts, tmp_path / "graph.json", *more))
    assert isinstance(result.exception, ConfigError)
    assert text in str(result.exception)
    assert decoded == []


def test_a_model_of_windows_has_nothing_to_calibrate(prompts, decoded, tmp_path, monkeypatch):
    monkeypatch.setattr(server_settings, "read_config", lambda model: {"architectures": ["WeDLMForCausalLM"]})
    result = run("some/model", "--prompts", prompts, "-o", tmp_path / "graph.json")
    assert isinstance(result.exception, ConfigError)
    assert "nothing to calibrate; serve it with" in str(result.exception)
    assert not decoded


def test_refuses_a_single_prompt(tmp_path, decoded):
    path = tmp_path / "one.jsonl"
    path.write_text('{"text": "alone"}\n')
    result = run(*options(path, tmp_path / "graph.json"))
    assert isinstance(result.exception, ConfigError)
    assert "has one prompt; give two or more" in str(result.exception)


@pytest.mark.parametrize(("helps", "word"), [(True, "kept"), (False, "left out")])
def test_token_weights_are_written_where_they_help(prompts, decoded, tmp_path, monkeypatch, helps, word):
    monkeypatch.setattr(WeightsTrial, "helps", helps)
    output = tmp_path / "graph.json"
    result = run(*options(prompts, output))
    assert result.exit_code == 0, result.exception
    assert (load_graph(output).graph.tokens is not None) == helps
    assert f"without: {word}" in result.output


def test_at_a_temperature_token_weights_are_not_tried(prompts, decoded, tmp_path):
    output = tmp_path / "graph.json"
    result = run(*options(prompts, output, "--temperature", 0.7))
    assert result.exit_code == 0, result.exception
    assert load_graph(output).graph.tokens is None
    assert "token weights" not in result.output
