"""`speculative_config` of method `spiffy`: its forms, what is refused and in which words, and what the engine gets."""

import copy
import functools
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

from vllm_dllm.config import DllmConfig
from vllm_dllm.draft.graph import DraftGraph
from vllm_dllm.draft.graph_file import GraphFile, default_graph, dump_graph
from vllm_dllm.errors import ConfigError
from vllm_dllm.names import KvPolicyName
from vllm_dllm.spiffy_config import (
    SpiffySettings,
    field_names,
    parse_spiffy,
    read_speculative_config,
    spiffy_settings,
    to_json_object,
)

CHAIN = replace(DraftGraph.chain(12), tokens_per_step=1)
GRAPH: dict[str, Any] = json.loads(dump_graph(GraphFile(CHAIN)))


def settings(given: dict[str, Any], **server: Any) -> SpiffySettings:
    """All the way from what a user gives to what the engine gets."""
    text = json.dumps(to_json_object(parse_spiffy({"method": "spiffy"} | given)))
    return spiffy_settings(text, DllmConfig(**server), "models/ours", "llada")


def calibrated(model: str = "models/ours", **server: Any) -> dict[str, Any]:
    """The graph with a provenance."""
    return GRAPH | {
        "provenance": {
            "model": model,
            "family": "llada",
            "settings": DllmConfig(**server).model_dump(),
            "temperature": 0.0,
            "prompts": [{"file": "prompts.jsonl", "sha256": "0" * 64, "num_prompts": 1}],
            "seed": 0,
            "versions": {"vllm_dllm": "1", "vllm": "1", "torch": "1"},
            "date": "2026-01-31",
        }
    }


def test_defaults() -> None:
    found = settings({})
    assert (found.budget, found.max_nodes, found.exactness, found.source) == (None, 10, "exact", "default")
    assert found.graph == default_graph("static").graph


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (None, 10)),
        ({"budget": 0}, (0, 0)),
        ({"budget": 11}, (11, 11)),
        ({"budget": 64}, (12, 12)),
        ({"budget": 3, "max_nodes": 5}, (3, 3)),
        ({"max_nodes": 5}, (None, 5)),
        ({"max_nodes": 64}, (None, 12)),
        ({"max_nodes": None, "budget": "auto"}, (None, 10)),
    ],
)
def test_budget_and_nodes_end_at_the_graph(given: dict[str, Any], expected: tuple[int | None, int]) -> None:
    found = settings({"draft_graph": GRAPH} | given)
    assert (found.budget, found.max_nodes) == expected
    assert found.graph == CHAIN


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"budget": 99}, ["speculative_config.budget is 99, allowed are 'auto' and whole numbers from 0", "64"]),
        ({"budget": -1}, ["speculative_config.budget is -1"]),
        ({"budget": True}, ["speculative_config.budget is True"]),
        ({"budget": "3"}, ["speculative_config.budget is '3'"]),
        ({"budget": 7, "max_nodes": 5}, ["speculative_config: budget is 7 but max_nodes is 5", "0..5"]),
        ({"max_nodes": 0}, ["speculative_config.max_nodes is 0, allowed are null and whole numbers from 1 to 64"]),
        ({"max_nodes": 2.0}, ["speculative_config.max_nodes is 2.0"]),
        ({"exactness": "exactly"}, ["speculative_config.exactness is 'exactly', allowed are 'exact' and 'near'"]),
        ({"draft_graph": 3}, ["speculative_config.draft_graph is 3, allowed are 'default', the path of a file"]),
        ({"draft_graph": {"nodes": []}}, ["speculative_config.draft_graph"]),
        ({"draft_graph": "gone.json"}, ["gone.json is not a file"]),
        ({"num_speculative_tokens": 3}, ["speculative_config.num_speculative_tokens is 3, but", "budget"]),
        ({"method": "eagle"}, ["speculative_config.method is 'eagle', allowed are 'spiffy'"]),
    ],
)
def test_fields_are_refused_by_name(given: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        settings(given)
    assert all(part in str(refused.value) for part in parts), str(refused.value)


def test_a_field_is_given_once_however_it_is_written() -> None:
    assert field_names({"draft-graph": "a", "max_nodes": 3, 1: 2}) == {"draft_graph": "a", "max_nodes": 3, "1": 2}
    with pytest.raises(ConfigError) as refused:
        field_names({"max_nodes": 3, "draft-graph": "a", "max-nodes": 4})
    assert str(refused.value) == (
        "speculative_config.max_nodes is 3 and speculative_config.max-nodes is 4, but both are "
        "speculative_config.max_nodes; allowed is one of them; remove the other"
    )


def test_a_file_is_read_and_its_graph_is_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "graphs").mkdir()
    (tmp_path / "graphs" / "chain.json").write_text(json.dumps(GRAPH))
    path = tmp_path / "spiffy.json"
    path.write_text('{"method": "spiffy", "draft_graph": "graphs/chain.json"}')
    for value in (path, str(path)):
        given = read_speculative_config(value)
        assert isinstance(given, dict)
        assert settings(given).graph == CHAIN
        assert settings(given).source == str(tmp_path / "graphs" / "chain.json")
    text = path.read_text()
    with pytest.raises(ConfigError, match=r"graphs/chain\.json is not a file"):
        settings(read_speculative_config(text))  # type: ignore[arg-type]
    monkeypatch.chdir(tmp_path)
    assert settings(read_speculative_config(text)).graph == CHAIN  # type: ignore[arg-type]
    assert settings(read_speculative_config("spiffy.json")).graph == CHAIN  # type: ignore[arg-type]


def test_only_paths_and_texts_are_read(tmp_path: Path) -> None:
    given = {"method": "spiffy", "draft_graph": "chain.json"}
    for value in (given, None, 3):
        assert read_speculative_config(value) is value
    assert given == {"method": "spiffy", "draft_graph": "chain.json"}
    path = tmp_path / "spiffy.json"
    for content in (
        {"method": "spiffy", "draft_graph": "default"},
        {"draft_graph": {"nodes": []}},
        {"method": "eagle"},
    ):
        path.write_text(json.dumps(content))
        assert read_speculative_config(path) == content


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[1]", "this holds no object"),
        (b'{"method": ', "this is not JSON"),
        (b"\xff\xfe", "this file is not UTF-8 text (byte 0)"),
        (b'{"a": ' + b"[" * 200_000, "this is not JSON"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "this is not JSON"),
    ],
)
def test_unreadable_files_are_told(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "spiffy.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        read_speculative_config(str(path))
    assert f"speculative_config is {str(path)!r}, but {reason}" in str(refused.value)
    assert "allowed are an object, its JSON text and the path of a file" in str(refused.value)


@pytest.mark.parametrize("path", ["gone.json", ".", "", "a\0b", "\ud800", "x" * 5000, "[1]"])
def test_paths_without_a_file_are_told(path: str) -> None:
    with pytest.raises(ConfigError, match=r"but (there is no such file|this is a folder|this file cannot be read)"):
        read_speculative_config(path)


@pytest.mark.parametrize("policy", ["static", "random", "threshold", "factor"])
def test_the_default_graph_is_the_policys_and_says_what_is_better(policy: str) -> None:
    found = settings({"draft_graph": "default"}, policy=policy)
    assert found.graph == default_graph(policy).graph  # type: ignore[arg-type]
    assert len(found.warnings) == 1
    assert "vllm-dllm calibrate models/ours" in found.warnings[0]
    assert f"--policy {policy}" in found.warnings[0]


@pytest.mark.parametrize(
    ("policy", "block_length", "family", "made_for"),
    [
        ("dynamic", 4, "sdar", ("sdar", "dynamic", 4)),
        ("dynamic", 32, "sdar", ("sdar", "dynamic", 8)),
        ("static", 5, "sdar", ("sdar", "static", 4)),
        ("sequential", 16, "sdar", ("sdar", "static", 8)),
        ("static", 8, "llada", ("llada", "static", 32)),
        ("threshold", 8, "sdar", ("llada", "threshold", 32)),  # the policy counts before the family
        ("entropy", 32, "Dream", ("llada", "static", 32)),
    ],
)
def test_the_default_graph_is_the_most_similar(policy, block_length, family, made_for) -> None:
    made = default_graph(policy, block_length, family).provenance
    assert (made.family, made.settings.policy, made.settings.block_length) == made_for


@pytest.mark.parametrize("block_length", [1, 2, 3])
def test_the_default_graph_fits_short_blocks(block_length: int) -> None:
    graph = settings({"max_nodes": 64}, block_length=block_length).graph
    assert max(rank for formula in graph.formulas for rank, _ in formula) < block_length
    assert graph.parents_first() == graph


def test_a_graph_with_more_positions_than_a_block_is_refused() -> None:
    assert settings({"draft_graph": GRAPH}, block_length=12).max_nodes == 10
    with pytest.raises(ConfigError, match=r"speculative_config\.draft_graph.*block_length"):
        settings({"draft_graph": GRAPH}, block_length=11)


def test_a_graph_of_another_server_is_told() -> None:
    assert settings({"draft_graph": calibrated()}).warnings == ()
    (warning,) = settings({"draft_graph": calibrated(model="theirs")}).warnings
    assert "model 'theirs'" in warning
    assert "vllm-dllm calibrate" in warning
    assert settings({"draft_graph": calibrated(policy="threshold")}).warnings


NEAR: list[dict[str, Any]] = [{"kv_policy": name} for name in ("prefix", "dkv", "dkv_pd")] + [{"refresh_every": 4}]
EXACT: list[dict[str, Any]] = [
    *({"kv_policy": name} for name in ("dual", "freecache", "vicinity", "block_causal", "causal")),
    {"refresh_every": 1},
]


def test_each_kv_policy_is_exact_or_near_or_takes_no_drafts() -> None:
    named = {server["kv_policy"] for server in (*NEAR, *EXACT) if "kv_policy" in server}
    assert named == set(get_args(KvPolicyName)) - {"window"}  # which refuses drafts: tests/engine/test_sliding_rules.py
    for server in EXACT:
        assert settings({}, **server).exactness == settings({"exactness": "near"}, **server).exactness == "exact"


@pytest.mark.parametrize("server", NEAR)
def test_kv_policies_that_are_not_exact_are_refused_unless_near_will_do(server: dict[str, Any]) -> None:
    name, value = next(iter(server.items()))
    with pytest.raises(ConfigError) as refused:
        settings({"exactness": "exact"}, **server)
    message = str(refused.value)
    assert f"exactness is 'exact', but additional_config.dllm.{name} is {value!r}" in message
    assert "kv_policy 'dual' without refresh_every or with 1, 'freecache' and 'vicinity'" in message
    assert "exactness 'near'" in message
    assert settings({"exactness": "near"}, **server).exactness == "near"


def test_near_is_exact_where_nothing_is_lost() -> None:
    assert settings({"exactness": "near"}).exactness == "exact"


def test_settings_are_parsed_once() -> None:
    assert settings({"draft_graph": GRAPH}) is settings({"draft_graph": copy.deepcopy(GRAPH)})


ODD: list[Any] = [
    *(
        None,
        True,
        0,
        -1,
        1,
        3,
        65,
        1024,
        10**30,
        0.5,
        float("nan"),
        float("inf"),
        "",
        "auto",
        "default",
        "\ud800",
        "a\0",
    ),
    *("exact", "near", "spiffy", "1", [], {}, [[]], [[0, 0]], [[0, 0], [0, 1]], [[9, 15]], {"": {}}, {"nodes": [{}]}),
]


def mutate_object(rng: random.Random, value: Any) -> Any:
    """Replace, remove, add or double something, anywhere inside."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.2:
        return copy.deepcopy(rng.choice(ODD))
    value = copy.copy(value)
    key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    match rng.randrange(6):
        case 0:
            del value[key]
        case 1 if isinstance(value, dict):
            value[rng.choice(["budget", "max_nodes", "draft_graph", "x", "", "\ud800"])] = rng.choice(ODD)
        case 1:
            value.insert(rng.randrange(len(value)), rng.choice([value[key], *ODD]))
        case _:
            value[key] = mutate_object(rng, value[key])
    return value


def mutate_text(rng: random.Random, text: str) -> bytes:
    """Cut out, double or overwrite a few bytes."""
    data = bytearray(text.encode())
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        start = rng.randrange(len(data) + 1)
        end = min(len(data), start + rng.choice([0, 1, 1, 4, 30]))
        data[start:end] = rng.choice([b"", bytes([rng.randrange(256)]), bytes(data[start:end]) * 2, b"9", b"[", b'"'])
    return bytes(data)


def outcome(make: Callable[[], Any]) -> str:
    try:
        make()
    except ConfigError:
        return "refused"
    return "works"


def test_two_thousand_mutations_work_or_are_refused(tmp_path: Path) -> None:
    """Mutated: the object, the settings' file, the graph's file."""
    rng = random.Random(3)
    path, graph_path = tmp_path / "spiffy.json", tmp_path / "graph.json"
    graph = calibrated()
    given = {"method": "spiffy", "draft_graph": graph, "budget": 3, "max_nodes": 8, "exactness": "exact"}
    outcomes = {"works": 0, "refused": 0}

    def use(value: object) -> None:
        server = DllmConfig(block_length=rng.choice([32, 32, 4]), refresh_every=rng.choice([None, None, None, 2]))
        fields = read_speculative_config(value)
        config = parse_spiffy(fields if isinstance(fields, dict) else {})
        spiffy_settings(json.dumps(to_json_object(config)), server, "models/ours", "llada")

    for number in range(2000):
        value: object = path
        graph_path.write_text(json.dumps(graph))
        path.write_text(json.dumps(given | {"draft_graph": rng.choice(["default", "graph.json"])}))
        if number % 3 == 0:
            value = given
            for _ in range(rng.choice([1, 1, 2, 3])):
                value = mutate_object(rng, value)
        else:
            target = path if number % 3 == 1 else graph_path
            target.write_bytes(mutate_text(rng, target.read_text()))
        outcomes[outcome(functools.partial(use, value))] += 1
    assert min(outcomes.values()) > 200, outcomes
