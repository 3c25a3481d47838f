"""What drafts could save if more were known, counted on hand-made traces and against brute force."""

import itertools
import math

import numpy as np
import pytest

from benchmarks.ablations.ceiling import (
    KNOWN,
    Drafter,
    accept_length,
    anchors_of,
    ends,
    first_guesses,
    likeliest_sets,
    likeliest_tokens,
    ratio,
    report,
)
from benchmarks.ablations.drafting import Material
from tests.calibrate.traces import MASK, make_block, random_trace
from vllm_dllm.calibrate.count import Decoding
from vllm_dllm.config import DllmConfig
from vllm_dllm.draft.readiness import BY_CONFIDENCE
from vllm_dllm.errors import ConfigError

TEXT, CONFIDENCE = [10, 11, 12, 13, 14], [0.9, 0.8, 0.7, 0.6, 0.5]
FORESEEN, BACKWARDS = [[0], [1], [2], [3], [4]], [[4], [3], [2], [1], [0]]


def drafter(name, *, is_one_by_one=True):
    return Drafter(KNOWN[name], BY_CONFIDENCE, is_one_by_one=is_one_by_one)


def ratios(block, budget):
    blocks = [anchors_of(block, MASK)]
    return {name: ratio(blocks, drafter(name), budget) for name in KNOWN}


def test_what_is_foreseen_takes_one_forward_for_each_chain():
    # Four anchors; three steps leave a mask, the last one needs no draft.
    assert ratios(make_block(TEXT, FORESEEN, CONFIDENCE), 3)["both known"] == 4.0
    assert ratios(make_block(TEXT, FORESEEN, CONFIDENCE), 1)["both known"] == 2.0


def test_who_knows_the_order_is_not_misled_by_confidence():
    found = ratios(make_block(TEXT, BACKWARDS, CONFIDENCE), 3)
    assert found["order known"] == found["both known"] == 4.0
    assert found["nothing known"] < found["order known"]


def test_who_knows_the_tokens_is_not_misled_by_probability():
    found = ratios(make_block(TEXT, FORESEEN, CONFIDENCE, wrong=[1, 2, 3]), 1)
    assert found["tokens known"] == found["both known"] == 2.0
    assert found["nothing known"] == found["order known"] == 1.0
    never = ratios(make_block(TEXT, FORESEEN, CONFIDENCE, wrong=dict.fromkeys(range(5))), 10)
    assert never["order known"] == 1.0, "a token that is no candidate cannot be guessed"
    assert never["tokens known"] == 4.0


@pytest.mark.parametrize("is_one_by_one", [True, False])
def test_sets_come_in_the_order_of_their_probabilities(is_one_by_one):
    rng = np.random.default_rng(3)
    for _ in range(20):
        odds = [(float(value), i) for i, value in enumerate(rng.normal(0, 2, 5))]
        sizes = [1] if is_one_by_one else range(1, 6)
        weights = {
            frozenset(chosen): math.fsum(odds[i][0] for i in chosen)
            for size in sizes
            for chosen in itertools.combinations(range(5), size)
        }
        log_z = math.log(math.fsum(map(math.exp, weights.values())))
        found = list(likeliest_sets(odds, is_one_by_one=is_one_by_one))
        assert [chosen for _, chosen in found] == sorted(weights, key=lambda chosen: -weights[chosen])
        assert [log_p for log_p, _ in found] == pytest.approx([weights[chosen] - log_z for _, chosen in found])


def test_fillings_are_the_likeliest_of_all():
    block = random_trace(np.random.default_rng(5), num_blocks=1).blocks[0]
    anchor = anchors_of(block, MASK)[0]
    every = [
        (sum(anchor.log_probs[i, rank] for i, rank in zip((2, 4, 5), ranks, strict=True)), ranks)
        for ranks in itertools.product(range(anchor.token_ids.shape[1]), repeat=3)
    ]
    found = likeliest_tokens(anchor, frozenset([2, 4, 5]), 9)
    assert [log_p for log_p, _ in found] == pytest.approx(sorted((log_p for log_p, _ in every), reverse=True)[:9])


@pytest.mark.parametrize("most_per_step", [1, 3])
def test_nodes_stand_behind_their_parents_and_knowledge_never_costs(most_per_step):
    rng = np.random.default_rng(7)
    blocks = [
        anchors_of(block, MASK) for _ in range(4) for block in random_trace(rng, most_per_step=most_per_step).blocks
    ]
    for name in KNOWN:
        one = drafter(name, is_one_by_one=most_per_step == 1)
        for anchor in itertools.chain.from_iterable(blocks):
            nodes = one.nodes(anchor, 8)
            assert len(set(nodes)) == len(nodes) <= 8
            assert all(
                not node or any(other < node for other in [frozenset(), *nodes[:i]]) for i, node in enumerate(nodes)
            )
            assert accept_length(anchor, nodes) <= len(anchor.steps)
    found = {name: ratio(blocks, drafter(name, is_one_by_one=most_per_step == 1), 8) for name in KNOWN}
    assert found["both known"] >= max(found.values())
    assert found["nothing known"] <= min(found.values())


def test_why_paths_end():
    foreseen = [anchors_of(make_block(TEXT, FORESEEN, CONFIDENCE), MASK)]
    assert ends(foreseen, drafter("both known"), 3) == {"block": 1}
    backwards = [anchors_of(make_block(TEXT, BACKWARDS, CONFIDENCE), MASK)]
    assert ends(backwards, drafter("nothing known"), 1) == {"positions": 3, "block": 1}
    wrong = [anchors_of(make_block(TEXT, FORESEEN, CONFIDENCE, wrong=dict.fromkeys(range(5))), MASK)]
    assert ends(wrong, drafter("nothing known"), 3) == {"tokens": 3, "block": 1}


def test_first_guesses_are_counted():
    assert first_guesses([anchors_of(make_block(TEXT, FORESEEN, CONFIDENCE), MASK)], drafter("nothing known")) == (1, 1)
    misled = make_block(TEXT, BACKWARDS, CONFIDENCE, wrong=[1])
    # Behind the first step the readiest is position 0, which comes last; of three tokens one is the second candidate.
    assert first_guesses([anchors_of(misled, MASK)], drafter("nothing known")) == (0, pytest.approx(2 / 3))


def material(**changes):
    rng = np.random.default_rng(11)
    traces = [random_trace(rng, prompt_idx=i) for i in range(6)]
    return Material(traces[:3], traces[3:], DllmConfig(block_length=8), Decoding(MASK, **changes))


def test_the_report_has_a_row_for_each_drafter_and_shares_that_add_up_to_one():
    lines = list(report(material()))
    rows = {
        line.split("|")[1].strip(): [float(cell) for cell in line.split("|")[2:-1]]
        for line in lines
        if "." in line and "|" in line
    }
    assert set(KNOWN) <= set(rows)
    shares = [rows[end] for end in ("block", "positions", "tokens")]
    assert [sum(column) for column in zip(*shares, strict=True)] == pytest.approx([1.0] * 4, abs=0.03)


def test_traces_with_noise_are_refused():
    with pytest.raises(ConfigError, match="temperature"):
        list(report(material(temperature=0.7)))
