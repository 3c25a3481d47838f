"""Graph files: reading returns what was written, and whatever is malformed is refused by place, value and remedy."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.draft.example_graph import FILE, GRAPH, PROVENANCE
from vllm_dllm.draft.graph import MAX_CANDIDATES, MAX_NODES, DraftGraph
from vllm_dllm.draft.graph_file import (
    MAX_FILE_BYTES,
    GraphFile,
    dump_graph,
    load_graph,
    parse_graph,
    save_graph,
)
from vllm_dllm.draft.graph_schema import Provenance
from vllm_dllm.draft.token_weights import TokenWeights
from vllm_dllm.errors import GraphError

Change = Callable[[dict], object]


def content() -> dict:
    """A valid graph file's content."""
    return json.loads(dump_graph(FILE))


def refusal(value: object) -> str:
    with pytest.raises(GraphError) as refused:
        parse_graph(value)
    return str(refused.value)


# Reading and writing


formulas = st.dictionaries(st.integers(0, 15), st.integers(0, MAX_CANDIDATES - 1), min_size=1, max_size=6).map(
    lambda pairs: tuple(sorted(pairs.items()))
)


@st.composite
def graph_files(draw) -> GraphFile:
    nodes = tuple(draw(st.lists(formulas, min_size=1, max_size=MAX_NODES, unique=True)))
    num_anchors = draw(st.integers(0, 2**53 - 1))
    same_length = {"min_size": len(nodes), "max_size": len(nodes)}
    counts = draw(st.none() | st.lists(st.integers(0, num_anchors), **same_length).map(tuple))
    weight = st.floats(-100, 100)
    tokens = draw(st.none() | st.builds(TokenWeights, weight, weight, st.tuples(*[weight] * 4)))
    graph = DraftGraph(nodes, None, counts, num_anchors, tokens=tokens)
    return GraphFile(graph.parents_first(), draw(st.sampled_from([None, PROVENANCE])))


@given(graph_files())
def test_reading_returns_what_was_written(file: GraphFile) -> None:
    text = dump_graph(file)
    assert parse_graph(json.loads(text)) == file
    assert dump_graph(parse_graph(json.loads(text))) == text


def test_a_saved_file_loads(tmp_path: Path) -> None:
    save_graph(FILE, tmp_path / "graph.json")
    assert load_graph(tmp_path / "graph.json") == FILE


def test_the_example_of_the_documentation_loads() -> None:
    page = (Path(__file__).parents[2] / "docs/draft-graphs.md").read_text()
    [example] = re.findall(r"^```json\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    file = parse_graph(json.loads(example))
    assert dump_graph(file) == example


def test_a_file_without_token_weights_has_none_and_is_written_as_before() -> None:
    assert parse_graph(content()).graph.tokens is None
    assert parse_graph(content() | {"tokens": None}) == FILE
    assert '"tokens":' not in dump_graph(FILE)
    for path in (Path(__file__).parents[2] / "vllm_dllm/draft/graphs").glob("*.json"):
        file = load_graph(path)
        assert file.graph.tokens is None
        written, old = json.loads(dump_graph(file)), json.loads(path.read_text())
        assert [*written.items()][:-1] == [*old.items()][:-1], "provenance gets the settings of later versions"


def test_token_weights_may_leave_out_what_is_zero() -> None:
    file = parse_graph(content() | {"tokens": {"slope": 2}})
    assert file.graph.tokens == TokenWeights(2.0)
    assert json.loads(dump_graph(file))["tokens"] == {"slope": 2.0, "slope_beside_new": 0.0, "same": [0.0] * 4}


def test_a_node_is_a_line() -> None:
    assert '\n    {"formula": [[0, 0], [1, 0]], "count": 30},\n' in dump_graph(FILE)


@given(graph_files(), st.randoms(use_true_random=False))
def test_the_order_of_listing_is_irrelevant_to_validity(file: GraphFile, shuffle) -> None:
    listed = json.loads(dump_graph(file))
    shuffle.shuffle(listed["nodes"])
    for node in listed["nodes"]:
        shuffle.shuffle(node["formula"])
    graph = parse_graph(listed).graph
    assert sorted(graph.formulas) == sorted(file.graph.formulas)
    assert all(parent < node for node, parents in enumerate(graph.parents, start=1) for parent in parents)


def test_budgets_are_written_in_order() -> None:
    provenance = Provenance.model_validate(PROVENANCE.model_dump() | {"predicted_nfe": {10: 9.25, 0: 32.0, 3: 14.5}})
    assert dump_graph(GraphFile(GRAPH, provenance)) == dump_graph(FILE)


@pytest.mark.parametrize(
    "graph",
    [
        DraftGraph(()),
        DraftGraph((((0, MAX_CANDIDATES),),)),
        DraftGraph((((0, 0), (1, 0)),), 1),
        DraftGraph((((0, 0),),), 1, (3,), 2),
    ],
    ids=["empty", "rank", "unconnected", "count"],
)
def test_what_cannot_be_read_is_not_written(graph: DraftGraph, tmp_path: Path) -> None:
    with pytest.raises(GraphError, match="this graph"):
        save_graph(GraphFile(graph), tmp_path / "graph.json")
    assert not list(tmp_path.iterdir())


def test_a_path_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match="cannot be written"):
        save_graph(FILE, tmp_path / "missing" / "graph.json")


# Refusals


def at(*path: int | str) -> Callable[[object], Change]:
    """Make a change that puts a value at a place."""

    def put(value: object) -> Change:
        def change(graph: dict) -> None:
            target = graph
            for key in path[:-1]:
                target = target[key]
            target[path[-1]] = value

        return change

    return put


MALFORMED: list[tuple[Change, list[str]]] = [
    (at("nodes", 3, "formula", 0, 1)(8), ["nodes[3].formula[0][1] is 8", "0..7"]),
    (at("nodes", 3, "formula", 0, 1)(True), ["nodes[3].formula[0][1] is True"]),
    (at("nodes", 3, "formula", 0, 0)(-1), ["nodes[3].formula[0][0] is -1", "0..1023"]),
    (at("nodes", 3, "formula", 0, 0)(1024), ["nodes[3].formula[0][0] is 1024"]),
    (at("nodes", 3, "formula", 0, 0)("0"), ["nodes[3].formula[0][0] is '0'"]),
    (at("nodes", 3, "formula", 0, 0)(1.5), ["nodes[3].formula[0][0] is 1.5"]),
    (at("nodes", 3, "formula", 0, 0)(float("nan")), ["nodes[3].formula[0][0] is nan"]),
    (at("nodes", 3, "formula", 0, 0)(10**400), ["nodes[3].formula[0][0] is 1000"]),
    (at("nodes", 3, "formula", 0)([1]), ["nodes[3].formula[0][1] is missing", "[position rank, vocab rank]"]),
    (at("nodes", 3, "formula", 0)([1, 0, 0]), ["nodes[3].formula[0] has 3 entries"]),
    (at("nodes", 3, "formula")([]), ["nodes[3].formula has 0 entries", "at least one"]),
    (at("nodes", 3, "formula")([[2, 0], [2, 1]]), ["nodes[3].formula is [[2, 0], [2, 1]]", "each position rank once"]),
    (at("nodes", 3, "formula")([[0, 0]]), ["nodes[3].formula is [[0, 0]], as is nodes[0].formula", "remove"]),
    (at("nodes", 3, "formula")([[3, 0], [4, 0]]), ["nodes[3].formula, {3-4}, has no parent", "tokens_per_step 1"]),
    (at("nodes", 3, "formula")([[16, 0]]), ["settings.block_length is 16", "nodes[3].formula has position rank 16"]),
    (at("nodes", 3, "tokens")(1), ["nodes[3].tokens is not known", "formula, count"]),
    (at("nodes", 3)({"count": 1}), ["nodes[3].formula is missing"]),
    (at("nodes", 3, "count")(-1), ["nodes[3].count is -1", "whole numbers from 0 on"]),
    (at("nodes", 3, "count")(None), ["nodes[3].count is missing", "all of them or none"]),
    (at("nodes", 0, "count")(101), ["nodes[0].count is 101", "num_anchors is 100", "0..100"]),
    (at("nodes")([]), ["nodes has 0 entries", "1 to 64 objects with the fields formula"]),
    (at("nodes")({}), ["nodes is {}"]),
    (lambda g: g["nodes"].extend({"formula": [[n, 0]], "count": 0} for n in range(2, 63)), ["nodes has 65 entries"]),
    (at("tokens_per_step")(2), ["nodes[0].formula has 1 pairs", "multiples of 2"]),
    (at("tokens_per_step")(0), ["tokens_per_step is 0", "null and whole numbers from 1"]),
    (at("num_anchors")(2**53), ["num_anchors is 9007199254740992"]),
    (at("schema_version")(2), ["schema_version is 2", "only version 1"]),
    (at("schema_version")(True), ["schema_version is True"]),
    (at("readiness")({"slope": 1.0}), ["readiness.near is missing"]),
    (at("readiness")({"slope": 101.0, "near": [0.0, 0.0]}), ["readiness.slope is 101.0", "from -100 to 100"]),
    (at("readiness")({"slope": 1.0, "near": [0.0, float("nan")]}), ["readiness.near[1] is nan"]),
    (at("tokens")([1.0]), ["tokens is [1.0]", "null and objects"]),
    (at("tokens")({"same": [0, 0, 0, 0]}), ["tokens.slope is missing", "numbers from -100 to 100"]),
    (at("tokens")({"slope": "2"}), ["tokens.slope is '2'", "numbers from -100 to 100"]),
    (at("tokens")({"slope": 1, "slope_beside_new": 101}), ["tokens.slope_beside_new is 101", "from -100 to 100"]),
    (at("tokens")({"slope": 1, "same": [0, 0, 0]}), ["tokens.same[3] is missing", "lists of four numbers"]),
    (at("tokens")({"slope": 1, "same": [0, float("nan"), 0, 0]}), ["tokens.same[1] is nan", "lists of four numbers"]),
    (at("tokens")({"slope": 1, "slopes": 1}), ["tokens.slopes is not known", "slope, slope_beside_new, same"]),
    (at("nodes", 3, "expected")(1.5), ["nodes[0].expected is missing", "all of them or none"]),
    (at("nodes", 0, "expected")(-0.5), ["nodes[0].expected is -0.5", "finite numbers from 0 on"]),
    (at("weird key")(2), ["['weird key'] is not known", "num_anchors, readiness, tokens, nodes"]),
    (at("provenance", "settings", "policy")("best"), ["provenance.settings.policy is 'best'", "'static', 'random'"]),
    (at("provenance", "settings", "steps_per_block")(99), ["provenance.settings: steps_per_block is 99"]),
    (at("provenance", "settings", "speed")(9), ["provenance.settings.speed is not known", "block_length"]),
    (at("provenance", "prompts", 0, "sha256")("12"), ["provenance.prompts[0].sha256 is '12'", "64 hexadecimal"]),
    (at("provenance", "temperature")(float("inf")), ["provenance.temperature is inf", "finite"]),
    (at("provenance", "date")("yesterday"), ["provenance.date is 'yesterday'", "2026-01-31"]),
    (at("provenance", "acceptance_by_depth", 1)(1.5), ["provenance.acceptance_by_depth[1] is 1.5", "from 0 to 1"]),
    (at("provenance", "predicted_nfe", "many")(1.5), ["provenance.predicted_nfe.many is 'many'", "budgets 0..64"]),
    (at("provenance", "predicted_nfe", "65")(1.5), ["provenance.predicted_nfe['65'] is", "budgets 0..64"]),
    (at("provenance", "versions", "torch")(""), ["provenance.versions.torch is ''"]),
]


@pytest.mark.parametrize(("change", "parts"), MALFORMED, ids=[parts[0] for _, parts in MALFORMED])
def test_malformed_graphs_are_refused_by_place(change: Change, parts: list[str]) -> None:
    value = content()
    change(value)
    message = refusal(value)
    assert message.startswith("draft_graph: ")
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("value", [None, [], 3, "graph.json", {"nodes": {1, 2}}, {(1, 2): 3}, {1: 2}])
def test_other_objects_are_refused(value: object) -> None:
    assert refusal(value).startswith("draft_graph")


def test_objects_without_an_end_are_refused() -> None:
    endless: list = []
    endless.append(endless)
    assert "cannot be written as JSON" in refusal({"nodes": endless})
    assert "cannot be written as JSON" in refusal({"num_anchors": 10**5000})


TEXT = dump_graph(FILE)


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (b"", "not JSON"),
        (TEXT[:-20].encode(), "not JSON"),
        (b"\xff\xfe" + TEXT.encode(), "not UTF-8"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a":' * 300 + b"1" + b"}" * 300, "not JSON"),
        (TEXT.replace('"count": 5', '"count": 5, "count": 6').encode(), "the key 'count' is given 2 times"),
        (TEXT.replace('"count": 5', f'"count": {"9" * 5000}').encode(), "not JSON"),
        (TEXT.replace("llada-tiny", r"\ud800").encode(), "not JSON"),
        (TEXT.encode() + b" " * MAX_FILE_BYTES, "larger than"),
        (b"[1]", "objects with the fields"),
        (
            b'{"method": "spiffy", "draft_graph": "g.json"}',
            "is a speculative_config, and no graph: its draft_graph is 'g.json'",
        ),
    ],
    ids=[
        "empty",
        "truncated",
        "encoding",
        "lists",
        "objects",
        "repeated",
        "digits",
        "surrogate",
        "size",
        "list",
        "settings",
    ],
)
def test_files_that_hold_no_graph_are_refused_by_name(data: bytes, part: str, tmp_path: Path) -> None:
    path = tmp_path / "graph.json"
    path.write_bytes(data)
    with pytest.raises(GraphError, match=part) as refused:
        load_graph(path)
    assert str(refused.value).startswith(str(path))


@pytest.mark.parametrize("name", ["missing.json", ".", "a\0b", "x" * 5000])
def test_paths_without_a_file_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(GraphError, match=r"is a folder|is not a file|cannot be read"):
        load_graph(f"{tmp_path}/{name}")


def test_reading_a_graph_needs_no_torch() -> None:
    code = "import sys, vllm_dllm.draft.graph_file; print(sorted({'torch', 'vllm', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
