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
