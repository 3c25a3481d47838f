"""`vllm-dllm bench decode` and the commands of `python -m benchmarks` with engines, on the small model."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from benchmarks.__main__ import app as benchmarks
from tests.draft.example_graph import PROVENANCE
from tests.draft.rankers import make_ranker
from tests.e2e.rig import CHECKPOINT
from tests.e2e.wedlm import SlidingOracle, WindowCase, make_wild
from vllm_dllm.cli import main
from vllm_dllm.draft.ranker_file import RankerFile, save_ranker
from vllm_dllm.draft.readiness import Readiness
from vllm_dllm.measure.decode import RANKER, Comparison, Policy
from vllm_dllm.measure.workload import EngineSpec

pytestmark = [pytest.mark.engine, pytest.mark.slow("bench")]

GIVEN = {
    "--model": CHECKPOINT,
    "--prompts": CHECKPOINT.parent / "questions.jsonl",
    "--num-prompts": 3,
    "--gen-length": 64,
    "--concurrency": "2",
}


def run(program: typer.Typer, *command: str, **options: object) -> str:
    words = [str(word) for option in (GIVEN | options).items() for word in option]
    result = CliRunner().invoke(program, [*command, *words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_decode_measures_fewer_forwards_and_equal_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranker, specs = tmp_path / "ranker.safetensors", Comparison.specs
    save_ranker(RankerFile(make_ranker("small").weights, Readiness(), PROVENANCE), ranker)

    def with_three(self: Comparison, policy: Policy) -> dict[str, EngineSpec]:
        """Have the ranker's engine make three drafts in each step: `auto` may find that none pays here."""
        found = specs(self, policy)
        own = {**(found[RANKER].speculative_config or {}), "budget": 3}
        return {**found, RANKER: replace(found[RANKER], speculative_config=own)}

    monkeypatch.setattr(Comparison, "specs", with_three)
    options = {"--budgets": "3", "--chain": "", "--ranker": ranker, "--repeats": 1, "--out": tmp_path}
    run(main.app, "bench", "decode", **options)
    content = json.loads((tmp_path / "decode.json").read_text())
    runs = {taken["variant"]: taken for taken in content["runs"]}
    assert runs.keys() == {"off", "budget 3", "auto", "ranker"}
    assert {taken["num_tokens"] for taken in runs.values()} == {3 * 64}
    # One per token, the refresh of each block among them.
    assert (runs["off"]["stats"]["forwards"], runs["off"]["stats"]["refreshes"]) == (3 * 62, 3 * 2)
    drafted = runs["budget 3"]["stats"]
    assert drafted["refreshes"] == 3 * 2
    assert drafted["forwards"] + sum(drafted["accepted"]) == 3 * 62, "each draft that came true saves a forward"
    assert drafted["forwards"] < 0.8 * 3 * 62
    assert sum(drafted["proposed"]) <= 3 * drafted["forwards"]
    assert {step["budget"] for step in runs["budget 3"]["steps"]} == {3}
    ranked = runs["ranker"]["stats"]
    assert ranked["forwards"] + sum(ranked["accepted"]) == 3 * 62
    assert ranked["forwards"] < 3 * 62
    assert ranked["accepted"] != drafted["accepted"], "nobody trained it, so it makes other drafts"
    assert (tmp_path / "decode.svg").read_text().lstrip().startswith("<?xml")


def test_reference_and_engine_decode_the_same() -> None:
    out = run(benchmarks, "reference", **{"--num-prompts": 2, "--gen-length": 32, "--policy": "threshold"})
    assert "threshold 0.9" in out
    decoders = ("reference, no cache", "reference, dual cache", "engine, 2 at once")
    assert [out.count(decoder) for decoder in decoders] == [1, 1, 1]


def test_nemotron_beside_its_reference() -> None:
    model = CHECKPOINT.parents[1] / "tiny_nemotron/checkpoint"
    out = run(benchmarks, "reference", **{"--model": model, "--gen-length": 40, "--concurrency": "2"})
    rows = re.findall(r"│ (static|threshold 0.9) +│ (reference|engine, 2 at once) +│ +[\d.]+ │ +([\d.]+) │", out)
    assert [row[:2] for row in rows] == [
        (policy, decoder) for policy in ("static", "threshold 0.9") for decoder in ("reference", "engine, 2 at once")
    ]
    assert rows[0][2] == rows[1][2] == "1.00", "forwards per token"
    assert rows[2][2] == rows[3][2]


def test_stages_of_a_step() -> None:
    out = run(benchmarks, "stages")
    stages = {"forward", "row statistics", "runner", "schedule", "host total", "step"}
    assert {stage for stage in stages if f" {stage} " in out} == stages


def test_accuracy_beside_forwards() -> None:
    graph = CHECKPOINT.parent / "spiffy.json"
    options = {"--block-length": 32, "--policy": "static,threshold,eotp", "--speculative-config": graph}
    given = {name: value for name, value in GIVEN.items() if name != "--concurrency"}
    words = [str(word) for option in (given | options).items() for word in option]
    result = CliRunner().invoke(benchmarks, ["accuracy", *words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    rows = re.findall(r"│ (\w+) +│ +(\d+) % +│ +\d+ % +│ +([\d.]+) │ +([\d.]+) │ +([\d.]+) │ +(\d+) │", result.stdout)
    assert [row[0] for row in rows] == ["static", "threshold", "eotp"]
    assert [row[1] for row in rows[:2]] == ["100", "100"]
    static, threshold, _ = (tuple(map(float, row[3:5])) for row in rows)  # without drafts, and with as many as pay
    assert static[1] <= static[0] > threshold[0]


@pytest.fixture(scope="module")
def sliding(tmp_path_factory: pytest.TempPathFactory) -> SlidingOracle:
    path = tmp_path_factory.mktemp("wedlm") / "checkpoint"
    make_wild(path, has_biases=False)
    return SlidingOracle(path)


def test_decode_of_windows_takes_the_forwards_of_the_reference(sliding: SlidingOracle, tmp_path: Path) -> None:
    bound, length = 1.5, 40
    options = {"--gen-length": length, "--budgets": "2,5", "--repeats": 1, "--out": tmp_path, "--entropy-bound": bound}
    run(main.app, "bench", "decode", **options | {"--model": sliding.checkpoint})
    content = json.loads((tmp_path / "decode.json").read_text())
    runs = {taken["variant"]: taken["stats"] for taken in content["runs"]}
    assert runs.keys() == {"off", "budget 2", "budget 5", "auto"}
    prompts = content["comparison"]["workload"]["prompts"]
    cases = [WindowCase(prompt=tuple(ids), max_tokens=length, entropy_bound=bound) for ids in prompts]
    plain = sum(sliding.made(case).nfe for case in cases)
    assert (runs["off"]["forwards"], runs["off"]["refreshes"]) == (plain, 0)
    least_stored = len(cases) * (length - 2 * 16)  # before the last step, which emits two windows at most
    most_stored = sum(len(case.prompt) + length + 2 * 16 for case in cases)
    for found in runs.values():
        num_drafts, num_windows = sum(found["proposed"]), found["forwards"] + sum(found["proposed"])
        extra = found["rows"] - 16 * num_windows  # what drafts know at their fronts, and what is stored
        assert least_stored <= extra <= 15 * num_drafts + most_stored
    for budget in (2, 5):
        made, found = [sliding.drafted(case, budget) for case in cases], runs[f"budget {budget}"]
        assert found["forwards"] == sum(each.nfe for each in made)
        assert sum(found["accepted"]) == sum(each.num_accepted for each in made)
    assert runs["budget 5"]["forwards"] < 0.9 * plain
    assert runs["auto"]["forwards"] <= plain


def test_windows_beside_the_reference(sliding: SlidingOracle) -> None:
    out = run(benchmarks, "reference", **{"--model": sliding.checkpoint, "--gen-length": 24})
    assert "24 tokens each in windows of 16" in out
    rows = re.findall(
        r"│ entropy_bound 0.4 position_penalty 0.02 +│ (reference|engine, 2 at once) +│ +[\d.]+ │ +([\d.]+) │", out
    )
    assert [name for name, _ in rows] == ["reference", "engine, 2 at once"]
    assert rows[0][1] == rows[1][1], "forwards per token"
