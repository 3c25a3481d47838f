"""`bench decode` without an engine: who decodes when, what is made of it, and what is refused."""

import dataclasses
import json
import os
from pathlib import Path

import pytest

from benchmarks.budget import rounds
from tests.measure.fake_engine import ROWS, WORKLOAD, FakeEngine, install
from vllm_dllm.measure import decode
from vllm_dllm.measure.decode import Comparison, Key, Policy, Variant, compare, num_measurements, sections
from vllm_dllm.measure.plot import draw
from vllm_dllm.measure.report import Interval, Section, Spread, to_markdown
from vllm_dllm.measure.workload import EngineSpec
from vllm_dllm.spiffy_config import DEFAULT_MAX_NODES, parse_spiffy

POLICIES = (Policy({"policy": "static"}), Policy({"policy": "threshold", "threshold": 0.8}, "graph.json"))
COMPARISON = Comparison(WORKLOAD, POLICIES, budgets=(1, 12), chain=(3,), repeats=2)


def test_without_fixed_budgets_off_and_auto_remain() -> None:
    comparison = Comparison(WORKLOAD, POLICIES, budgets=(), chain=(), repeats=1)
    assert comparison.variants == [Variant("off"), Variant("auto")]
    specs = comparison.specs(POLICIES[0])
    assert list(specs) == ["off", "auto"]
    assert {spec.most_drafts for spec in specs.values()} == {DEFAULT_MAX_NODES}


def test_engines_are_what_a_user_would_start() -> None:
    specs = COMPARISON.specs(POLICIES[1])
    assert specs["off"].speculative_config is None
    configs = {name: parse_spiffy(spec.speculative_config) for name, spec in specs.items() if name != "off"}
    assert {name: (config.budget, config.max_nodes) for name, config in configs.items()} == {
        "auto": ("auto", None),
        "budget": (12, None),
        "chain": (3, None),
    }
    assert configs["auto"].draft_graph == configs["budget"].draft_graph == "graph.json"
    assert len(configs["chain"].draft_graph["nodes"]) == 3
    assert {json.dumps(spec.settings) for spec in specs.values()} == {'{"policy": "threshold", "threshold": 0.8}'}


def test_engines_have_room_for_the_workload_and_the_most_drafts() -> None:
    few = dataclasses.replace(COMPARISON, budgets=(1,), chain=())
    for comparison, most_drafts in ((COMPARISON, 12), (few, DEFAULT_MAX_NODES)):
        rooms = {spec.max_model_len for spec in comparison.specs(POLICIES[0]).values()}
        assert rooms == {2 + 4 + 2 * (2 + most_drafts)}


def test_everyone_decodes_in_each_round_after_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, announced = install(monkeypatch).calls, []
    runs = compare(COMPARISON, announced.append)
    assert len(announced) == num_measurements(COMPARISON) == 2 * (4 + 2 * (4 + 5 * 2))
    assert {len(measurements) for measurements in runs.values()} == {2}
    assert [(key.policy, key.concurrency, key.variant) for key in runs][:6] == [
        *(("static", 1, name) for name in ("off", "budget 1", "budget 12", "auto", "chain 3")),
        ("static", 2, "off"),
    ]
    at_once = [call for call in calls[: len(calls) // 2] if call[1] == 2]
    assert [num_prompts for *_, num_prompts in at_once] == [2] * 14
    first_round = [("off", 2, None), ("12", 2, 1), ("12", 2, 12), ("auto", 2, None), ("3", 2, 3)]
    assert [call[:3] for call in at_once[4:]] == first_round + first_round[::-1]


def test_tables_say_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    speed, depths, steps, intervals = (section.rows for section in sections(compare(COMPARISON, lambda _: None)))
    off, one = speed[:2]
    assert (off["tokens/s"], off["ratio"]) == (Spread(8.0, 8.0, 8.0), Spread(1.0, 1.0, 1.0))
    assert (off["NFE/token"], off["refreshes/token"], off["drafts/forward"]) == (1.5, 0.5, 0.0)
    assert len(intervals) == 2 * 2 * 4, "off has none"
    assert {(row["tokens/s"], row["tokens per CPU second"]) for row in intervals} == {("2.000 [2.000, 2.000]",) * 2}
    assert (one["ratio"], one["NFE/token"]) == (Spread(2.0, 2.0, 2.0), 1.0)
    assert (one["drafts/forward"], one["accepted/forward"], one["waste"]) == (1.0, 1.0, 0.0)
    assert speed[2]["waste"] == 1 - 1 / 12
    assert depths[0] == {"policy": "static", "drafts": "budget 1", "1": 1.0}
    assert steps[0] == {"engine": "off", "requests": 1, "most drafts": 0, "rows": ROWS, "steps": 40, "ms": 2.0}
    assert [row["rows"] for row in steps if row["most drafts"] == 12] == [ROWS + 12] * 2, "what the steps had"


def test_markdown_has_a_line_per_row() -> None:
    text = to_markdown([Section("a title", [{"name": "x", "ratio": Spread.of([1.5, 1.25, 4.0]), "share": 0.126}])])
    assert text == "a title:\n\n| name | ratio | share |\n| --- | --- | --- |\n| x | 1.50 (1.25 to 4.00) | 0.13 |\n"


def test_large_figures_have_no_decimals() -> None:
    assert str(Spread.of([240.4, 251.7])) == "246 (240 to 252)"


def test_picture_has_panels_per_policy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch)
    draw(sections(compare(COMPARISON, lambda _: None)), tmp_path / "decode.svg")
    picture = (tmp_path / "decode.svg").read_text()
    titles = ("static: speed", "threshold 0.8: acceptance by depth", "time of a step")
    assert [title in picture for title in titles] == [True] * 3


def test_each_start_has_engines_of_its_own_and_other_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    engines: list[FakeEngine] = []
    fake = install(monkeypatch)
    asked: list[tuple[int, int, int]] = []

    class Engine(fake):  # type: ignore[misc, valid-type]
        def __init__(self, spec: EngineSpec) -> None:
            super().__init__(spec)
            engines.append(self)

        def measure(self, concurrency: int, budget: int | None = None, num_prompts: int | None = None, first: int = 0):  # type: ignore[no-untyped-def]
            asked.append((len(engines), concurrency, first))
            return super().measure(concurrency, budget, num_prompts, first)

    monkeypatch.setattr(decode, "EngineProcess", Engine)
    comparison = dataclasses.replace(COMPARISON, policies=POLICIES[:1], budgets=(), chain=(), starts=2, waves=1)
    announced: list[str] = []
    runs = compare(comparison, announced.append)
    assert len(engines) == 4, "off and auto, twice"
    assert len(announced) == num_measurements(comparison)
    assert {len(measurements) for measurements in runs.values()} == {2 * 2}
    one_at_once = [(first, len(m.tokens)) for m, first in zip(runs[Key("static", 1, "off")], (0, 1, 0, 1), strict=True)]
    assert one_at_once == [(0, 1), (1, 1), (0, 1), (1, 1)]
    rounds = [(num, first) for num, concurrency, first in asked if concurrency == 1]
    assert rounds == [(n, first) for n in (2, 4) for first in (0, 0, 0, 0, 1, 1)], "two warm-ups, two rounds of two"
    assert {first for _, concurrency, first in asked if concurrency == 2} == {0}, "there are two prompts"


def test_a_ranker_is_a_way_more(tmp_path: Path) -> None:
    policies = (dataclasses.replace(POLICIES[0], ranker="ranker.safetensors"),)
    comparison = dataclasses.replace(COMPARISON, policies=policies)
    assert [variant.name for variant in comparison.variants] == [
        *("off", "budget 1", "budget 12", "auto", "ranker", "chain 3")
    ]
    with_one = comparison.specs(policies[0])["ranker"].speculative_config
    auto = comparison.specs(policies[0])["auto"].speculative_config
    assert with_one == {**(auto or {}), "ranker": "ranker.safetensors"}


def test_interval_holds_what_resampled_medians_are() -> None:
    values = [0.9, 1.0, 1.1, 1.2] * 4
    interval = Interval.of(values)
    assert interval == Interval.of(values), "it is the same each time"
    assert interval.median == pytest.approx(1.05)
    assert 0.9 < interval.low < interval.median < interval.high < 1.2
    assert str(Interval.of([1.0])) == "1.000 [1.000, 1.000]"


def test_interval_of_few_starts_is_wide() -> None:
    """Rounds of a start are alike, so the start decides; taken for independent they would promise too much."""
    values = [0.95] * 40 + [1.05] * 40 + [1.0] * 40
    alone, grouped = Interval.of(values), Interval.of(values, groups=3)
    assert (grouped.low, grouped.high) == (0.95, 1.05)
    assert alone.high - alone.low < grouped.high - grouped.low


def test_rounds_of_a_command_print_intervals_and_write_all_of_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install(monkeypatch)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    examples = Path(__file__).parents[2] / "examples"
    models = [str(examples / name / "checkpoint") for name in ("tiny_llada", "tiny_sdar")]
    asked = {"prompts": examples / "tiny_llada/questions.jsonl", "skip_prompts": 0, "gen_length": 8}
    rounds.main(models, **asked, concurrency="1,2", starts=2, repeats=2, out=tmp_path)
    assert os.environ["OMP_NUM_THREADS"] == "1"
    text = (tmp_path / "rounds.md").read_text()
    for policy in ("tiny_llada", "static"), ("tiny_sdar", "dynamic"), ("tiny_llada", "threshold"):
        assert policy[0] in text
        assert policy[1] in text
    assert text.count("2.000 [2.000, 2.000]") == 2 * 2 * 2 * 2
    content = json.loads((tmp_path / "rounds.json").read_text())
    assert len(content["rows"]) == 2 * 2 * 2
    runs = content["models"][1]["runs"]
    assert len(runs) == 2 * 2 * 2 * 4
    assert {(run["start"], run["round"]) for run in runs} == {(0, 0), (0, 1), (1, 2), (1, 3)}
