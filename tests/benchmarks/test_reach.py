"""Whether what is said of drafts comes true, on hand-made traces and on numbers with known answers."""

import math

import numpy as np
import pytest
import torch

from benchmarks.ablations.drafting import BUDGETS, Material
from benchmarks.ablations.reach import (
    POWERS,
    Said,
    bins,
    chances,
    error,
    fit,
    fitted,
    reordered,
    report,
    said,
    scores,
    to_the_power,
)
from benchmarks.budget.uneven import DEALS
from tests.calibrate.traces import MASK, make_block, make_trace, random_trace
from vllm_dllm.calibrate.count import Decoding
from vllm_dllm.calibrate.simulate import draft_blocks
from vllm_dllm.config import DllmConfig
from vllm_dllm.draft.compile import compile_graph
from vllm_dllm.draft.graph import DraftGraph

TEXT, CONFIDENCE = [50, 51, 52, 53, 54], [0.9, 0.8, 0.7, 0.6, 0.5]
NODES = (((0, 0),), ((0, 0), (1, 0)), ((1, 0),))


def material() -> Material:
    rng = np.random.default_rng(11)
    traces = [random_trace(rng, prompt_idx=i) for i in range(8)]
    return Material(traces[:4], traces[4:], DllmConfig(block_length=8), Decoding(MASK))


def test_what_is_said_is_the_corrected_probability_of_the_best_drafts() -> None:
    graph = DraftGraph(NODES, 1, counts=(8, 4, 2), num_anchors=10, expected=(4.0, 4.0, 2.0))
    foreseen = make_trace(make_block(TEXT, [[0], [1], [2], [3], [4]], CONFIDENCE))
    blocks = draft_blocks(graph, [foreseen], Decoding(MASK))
    best = said(graph, blocks, 1)
    # Of positions 1 to 4 the first is chosen by its odds among all, and has its token by its probability.
    odds = [confidence / (1 - confidence) for confidence in CONFIDENCE[1:]]
    assert best.probability[0] == pytest.approx(min(1, odds[0] / sum(odds) * 0.8 * 8.5 / 4.5))
    assert best.came_true.tolist() == [True, True, True]  # behind the fourth step a draft would be finished
    every = said(graph, blocks, 3)
    assert (len(every.probability), int(every.came_true.sum())) == (8, 5)


def test_drafts_are_counted_between_edges() -> None:
    drafts = Said(np.array([0.01, 0.25, 0.25, 0.28, 0.9, 1.0]), np.array([False, True, False, False, True, True]))
    assert list(bins(drafts)) == [
        ("0 to 0.02", 1, 0.01, 0.0),
        ("0.2 to 0.3", 3, pytest.approx(0.26), pytest.approx(1 / 3)),
        ("0.7 to 1", 2, 0.95, 1.0),
    ]
    assert error(drafts) == pytest.approx((0.01 + 3 * (1 / 3 - 0.26) + 2 * 0.05) / 6)


def test_the_fit_finds_what_bent_the_odds() -> None:
    rng = np.random.default_rng(0)
    probability = rng.uniform(0.01, 0.99, 40_000)
    true = 1 / (1 + np.exp(-(0.6 * np.log(probability / (1 - probability)) - 0.5)))
    drafts = Said(probability, rng.uniform(size=len(true)) < true)
    slope, bias = fit(drafts)
    assert (slope, bias) == (pytest.approx(0.6, abs=0.03), pytest.approx(-0.5, abs=0.04))
    assert fitted(drafts, 0.6, -0.5).probability == pytest.approx(true)
    assert error(fitted(drafts, slope, bias)) < 0.01 < error(drafts)


def test_power_1_is_as_served_and_others_reorder_behind_parents() -> None:
    given = material()
    graph = given.graph(12)
    used, held_out = (draft_blocks(graph, traces, given.decoding) for traces in (given.used, given.held_out))
    is_on_way = compile_graph(graph, torch.device("cpu")).is_on_way.numpy()
    assert to_the_power(graph, used, 1.0).expected == pytest.approx(graph.expected, rel=1e-5)
    assert graph.expected != pytest.approx(to_the_power(graph, used, 0.3).expected, rel=0.1)
    num_moved = 0
    for block in held_out:
        same, other = (reordered(graph, is_on_way, block, power) for power in (1.0, 0.3))
        assert all((getattr(same, name) == getattr(block, name))[block.is_valid].all() for name in ("node", "ahead"))
        num_moved += int((other.node != block.node).sum())
        for nodes, is_valid in zip(other.node.tolist(), other.is_valid.tolist(), strict=True):
            place = {node: at for at, node in enumerate(nodes)}
            assert is_valid == sorted(is_valid, reverse=True)
            parents = [graph.parents[node - 1][0] for node in nodes]
            assert all(not p or place[p] <= i for i, p in enumerate(parents) if is_valid[i])
    assert num_moved > 0


def test_expected_transitions_never_fall_and_gain_ever_less() -> None:
    given = material()
    graph = given.graph(12)
    for block in draft_blocks(graph, given.held_out, given.decoding):
        for row, first in zip(chances(graph, block), np.exp(scores(graph, block)[:, 0]), strict=True):
            gains = np.diff(row)
            assert row[0] == 0
            assert math.isclose(gains[0], min(1.0, first))
            assert (gains >= -1e-12).all()
            assert (np.diff(gains) <= 1e-12).all()


def test_the_report_has_what_was_said_powers_and_deals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.ablations.reach.NUM_STEPS", 200)
    given = material()
    of_drafts, errors, of_powers, of_deals = "\n".join(report(given)).split("\n\n")
    blocks = draft_blocks(given.graph(32), given.held_out, given.decoding)
    assert table(of_drafts)["all"][0] == sum(int(block.is_valid[:, :10].sum()) for block in blocks)
    assert errors.startswith("Error: 0.")
    assert table(of_powers).keys() == {f"{power:g}" for power in POWERS}
    assert table(of_powers)["1"] == [1.0] * len(BUDGETS)
    for even, *others in table(of_deals).values():
        deals = dict(zip([*DEALS, "by probabilities"][1:], others, strict=True))
        assert even > 1
        assert max(deals.values()) == deals["oracle"] > 1


def table(text: str) -> dict[str, list[float]]:
    """Read the rows of numbers by what stands first."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]
    return {name: list(map(float, cells)) for name, *cells in rows}
