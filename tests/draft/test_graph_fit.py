"""Which graphs fit a server, the graphs that are shipped, and graphs merged."""

import datetime
import json
from typing import get_args

import pytest

from tests.draft.example_graph import FILE, GRAPH, PROVENANCE
from vllm_dllm.config import DllmConfig
from vllm_dllm.draft import graph_file
from vllm_dllm.draft.graph import DraftGraph
from vllm_dllm.draft.graph_file import (
    GraphFile,
    _shipped_graphs,
    check_fit,
    default_graph,
    dump_graph,
    parse_graph,
)
from vllm_dllm.draft.graph_schema import ModelShape, PromptsFile, Provenance
from vllm_dllm.draft.merge import merge_graphs
from vllm_dllm.errors import GraphError
from vllm_dllm.names import PolicyName


@pytest.mark.parametrize("policy", get_args(PolicyName))
def test_there_is_a_graph_for_each_policy(policy: PolicyName) -> None:
    file = default_graph(policy)
    assert ((0, 0),) in file.graph.formulas
    assert file.provenance is not None
    own = {"static", "random", "threshold", "factor", "dynamic"}
    alike = "static" if policy in {"margin", "entropy", "sequential"} else "threshold"
    assert file.provenance.settings.policy == (policy if policy in own else alike)


def shipped(policy: PolicyName, family: str, block_length: int) -> tuple[Provenance, GraphFile]:
    settings = PROVENANCE.settings.model_copy(update={"policy": policy, "block_length": block_length})
    made = PROVENANCE.model_copy(update={"settings": settings, "family": family})
    return made, GraphFile(GRAPH, made)


@pytest.mark.parametrize(
    ("policy", "family", "block_length", "expected"),
    [
        ("dynamic", "sdar", 4, ("dynamic", "sdar", 4)),
        ("dynamic", "sdar", 5, ("dynamic", "sdar", 4)),
        ("dynamic", "sdar", 16, ("dynamic", "sdar", 32)),
        ("dynamic", "Dream", 32, ("dynamic", "sdar", 32)),  # the policy decides before the family
        ("static", "sdar", 32, ("static", "llada", 32)),
        ("margin", "Dream", 8, ("static", "llada", 32)),
    ],
)
def test_the_default_graph_is_the_one_that_suits_best(
    policy: PolicyName, family: str, block_length: int, expected: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [("dynamic", "sdar", 4), ("dynamic", "sdar", 32), ("static", "llada", 32), ("threshold", "Dream", 8)]
    monkeypatch.setattr(graph_file, "_shipped_graphs", lambda: [shipped(*file) for file in files])  # type: ignore[arg-type]
    made = default_graph(policy, block_length, family).provenance
    assert made is not None
    assert (made.settings.policy, made.family, made.settings.block_length) == expected


@pytest.mark.parametrize("block_length", [1, 2, 4])
def test_default_graphs_fit_short_blocks(block_length: int) -> None:
    for policy in get_args(PolicyName):
        file = default_graph(policy, block_length)
        graph, whole = file.graph, next(each.graph for made, each in _shipped_graphs() if made is file.provenance)
        assert graph.formulas == tuple(formula for formula in whole.formulas if formula[-1][0] < block_length)
        assert graph.formulas[0] == ((0, 0),)
        assert all(graph.parents)


def test_a_graph_fits_the_server_it_was_made_for() -> None:
    settings = PROVENANCE.settings.model_copy(update={"factor": 3.0, "steps_per_block": 4})  # threshold reads neither
    assert check_fit(FILE, settings, where="graph.json", model="other/place/llada-tiny", family="llada") == []


SHAPE = ModelShape(vocab_size=376, hidden_size=128, num_hidden_layers=6)


@pytest.mark.parametrize(
    ("model", "shape", "difference"),
    [
        ("any/where/checkpoint", SHAPE, None),
        ("any/where/checkpoint", SHAPE.model_copy(update={"num_hidden_layers": 7}), "shape 'vocab_size 376, hidden_si"),
        ("hub/llada-tiny", SHAPE, None),
        ("hub/other", SHAPE, "model 'llada-tiny' but is used with 'other'"),
        ("any/where/other", None, "model 'llada-tiny' but is used with 'other'"),
    ],
)
def test_a_model_is_known_by_its_shape_and_not_by_its_folder(
    model: str, shape: ModelShape | None, difference: str | None
) -> None:
    file = GraphFile(GRAPH, PROVENANCE.model_copy(update={"shape": SHAPE}))
    assert parse_graph(json.loads(dump_graph(file))) == file
    found = check_fit(file, PROVENANCE.settings, where="graph.json", model=model, family="llada", shape=shape)
    assert [difference in sentence for sentence in found if difference] == [True] * (difference is not None)
    assert bool(found) == bool(difference)


def test_a_shape_is_read_from_the_names_of_every_family() -> None:
    published = {"d_model": 128, "n_layers": 6, "vocab_size": 380, "embedding_size": 376, "hidden_size": None}
    assert ModelShape.of(published) == SHAPE
    assert ModelShape.of({"hidden_size": 128, "num_hidden_layers": 6, "vocab_size": 376}) == SHAPE
    assert ModelShape.of({"hidden_size": 128}) is None


@pytest.mark.parametrize(
    ("update", "names", "command"),
    [
        ({"threshold": 0.9}, ["threshold 0.8"], "--policy threshold --threshold 0.9"),
        ({"policy": "static"}, ["policy 'threshold'"], "--block-length 16 --policy static --output"),
        (
            {"policy": "dynamic", "steps_per_block": 2},
            ["policy 'threshold'"],
            "--policy dynamic --threshold 0.8 --steps-per-block 2 --output",
        ),
        ({"policy": "random", "steps_per_block": 4}, ["policy 'threshold'"], "--policy random --steps-per-block 4"),
        ({"block_length": 8, "kv_policy": "prefix"}, ["block_length 16"], "--block-length 8"),
    ],
)
def test_a_graph_made_for_another_server_warns(update: dict, names: list[str], command: str) -> None:
    warnings = check_fit(FILE, PROVENANCE.settings.model_copy(update=update), where="graph.json", model="m")
    assert len(warnings) == len(names) + 1  # and the model
    assert all(warning.startswith("graph.json was calibrated with ") for warning in warnings)
    assert all("run: vllm-dllm calibrate m " in warning and command in warning for warning in warnings)
    assert all(any(name in warning for warning in warnings) for name in ["model 'llada-tiny'", *names])


def test_steps_may_be_left_out_where_they_are_as_many_as_positions() -> None:
    made = PROVENANCE.model_copy(update={"settings": DllmConfig(block_length=16)})
    file = GraphFile(GRAPH, made)
    assert check_fit(file, DllmConfig(block_length=16, steps_per_block=16), where="graph.json") == []
    assert len(check_fit(file, DllmConfig(block_length=16, steps_per_block=8), where="graph.json")) == 1


def test_a_graph_needs_a_block_with_its_positions() -> None:
    with pytest.raises(GraphError, match=r"block_length of this server is 1, but nodes\[1\].formula has .* rank 1"):
        check_fit(FILE, DllmConfig(block_length=1), where="graph.json")
    assert check_fit(GraphFile(GRAPH), DllmConfig(block_length=2), where="graph.json") == []


def test_merging_adds_up_and_keeps_the_most_frequent() -> None:
    other_prompts = PromptsFile(file="more.jsonl", sha256="1" * 64, num_prompts=9)
    other = GraphFile(
        DraftGraph((((2, 0),), ((1, 0),), ((1, 0), (2, 0))), 1, (45, 30, 90), 200),
        PROVENANCE.model_copy(update={"prompts": (other_prompts,)}),
    )
    merged = merge_graphs([("a", FILE), ("b", other)], 4)
    assert merged.graph.formulas == (((0, 0),), ((1, 0),), ((2, 0),), ((1, 0), (2, 0)))
    assert (merged.graph.counts, merged.graph.num_anchors) == ((80, 70, 45, 90), 300)
    assert merged.provenance.prompts == (*PROVENANCE.prompts, other_prompts)
    assert (merged.provenance.acceptance_by_depth, merged.provenance.predicted_nfe) == ((), {})
    assert parse_graph(json.loads(dump_graph(merged))) == merged


def test_a_calibration_is_counted_once() -> None:
    again = GraphFile(GRAPH, PROVENANCE.model_copy(update={"date": datetime.date(2026, 2, 1)}))
    with pytest.raises(GraphError, match=r"^b is the same calibration as a, so its counts would be added twice"):
        merge_graphs([("a", FILE), ("b", again)], 4)
    with pytest.raises(GraphError, match=r"^a is given twice, so its counts"):
        merge_graphs([("a", FILE), ("a", FILE)], 4)


@pytest.mark.parametrize(
    ("other", "part"),
    [
        (GraphFile(GRAPH), "b has no counts or no provenance"),
        (GraphFile(DraftGraph(GRAPH.formulas, 1), PROVENANCE), "b has no counts or no provenance"),
        (GraphFile(DraftGraph(GRAPH.formulas, None, GRAPH.counts, 100), PROVENANCE), "tokens_per_step None, but a"),
        (
            GraphFile(GRAPH, PROVENANCE.model_copy(update={"settings": DllmConfig(block_length=8)})),
            "b was calibrated with block_length 8, but a with 16",
        ),
        (GraphFile(GRAPH, PROVENANCE.model_copy(update={"model": "x"})), "b was calibrated with model 'x'"),
    ],
)
def test_graphs_of_different_servers_are_not_merged(other: GraphFile, part: str) -> None:
    with pytest.raises(GraphError, match=part):
        merge_graphs([("a", FILE), ("b", other)], 4)
