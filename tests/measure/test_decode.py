"""`bench decode` without an engine: who decodes when, what is made of it, and what is refused."""

import dataclasses
import json
from pathlib import Path

import pytest

from tests.measure.fake_engine import WORKLOAD, install
from vllm_dllm.measure.decode import (
    Comparison,
    Policy,
    Variant,
    chain_graph,
    compare,
    num_measurements,
    sections,
)
from vllm_dllm.measure.plot import draw
from vllm_dllm.measure.report import Section, Spread, to_markdown
from vllm_dllm.spiffy_config import DEFAULT_MAX_NODES, parse_spiffy

POLICIES = (Policy({"policy": "static"}), Policy({"policy": "threshold", "threshold": 0.8}, "graph.json"))
COMPARISON = Comparison(WORKLOAD, POLICIES, budgets=(1, 12), chain=(3,), repeats=2)


def test_without_fixed_budgets_off_and_auto_remain() -> None:
    comparison = Comparison(WORKLOAD, POLICIES, budgets=(), chain=(), repeats=1)
    assert comparison.variants == [Variant("off"), Variant("auto")]
    specs = comparison.specs(POLICIES[0])
    assert list(specs) == ["off", "auto"]
    assert {spec.most_drafts for spec in specs.values()} == {DEFAULT_MAX_NODES}


def test_chain_has_one_node_per_depth() -> None:
    graph = chain_graph(3)
    assert graph.formulas == (((0, 0),), ((0, 0), (1, 0)), ((0, 0), (1, 0), (2, 0)))
    assert graph.depths == (1, 2, 3)
    assert graph.parents == ((0,), (1,), (2,))


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
    assert [num_prompts for *_, num_prompts in at_once] == [2] * 4 + [None] * 10
    first_round = [("off", 2, None), ("12", 2, 1), ("12", 2, 12), ("auto", 2, None), ("3", 2, 3)]
    assert [call[:3] for call in at_once[4:]] == first_round + first_round[::-1]


def test_tables_say_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    speed, depths, steps = (section.rows for section in sections(compare(COMPARISON, lambda _: None), 2))
    off, one = speed[:2]
    assert (off["tokens/s"], off["ratio"]) == (Spread(8.0, 8.0, 8.0), Spread(1.0, 1.0, 1.0))
    assert (off["NFE/token"], off["refreshes/token"], off["drafts/forward"]) == (1.5, 0.5, 0.0)
    assert (one["ratio"], one["NFE/token"]) == (Spread(2.0, 2.0, 2.0), 1.0)
    assert (one["drafts/forward"], one["accepted/forward"], one["waste"]) == (1.0, 1.0, 0.0)
    assert speed[2]["waste"] == 1 - 1 / 12
    assert depths[0] == {"policy": "static", "drafts": "budget 1", "1": 1.0}
    assert steps[0] == {"engine": "off", "requests": 1, "drafts of each": 0, "rows": 2, "steps": 40, "ms": 2.0}
    assert [row["rows"] for row in steps if row["drafts of each"] == 12] == [26, 52]


def test_markdown_has_a_line_per_row() -> None:
    text = to_markdown([Section("a title", [{"name": "x", "ratio": Spread.of([1.5, 1.25, 4.0]), "share": 0.126}])])
    assert text == "a title:\n\n| name | ratio | share |\n| --- | --- | --- |\n| x | 1.50 (1.25 to 4.00) | 0.13 |\n"


def test_large_figures_have_no_decimals() -> None:
    assert str(Spread.of([240.4, 251.7])) == "246 (240 to 252)"


def test_picture_has_panels_per_policy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch)
    draw(sections(compare(COMPARISON, lambda _: None), 2), tmp_path / "decode.svg")
    picture = (tmp_path / "decode.svg").read_text()
    titles = ("static: speed", "threshold 0.8: acceptance by depth", "time of a step")
    assert [title in picture for title in titles] == [True] * 3
