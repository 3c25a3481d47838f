"""The value of drafts across a block's end, counted on hand-made traces."""

import pytest

from benchmarks.ablations.across import count_across, rows
from benchmarks.ablations.drafting import Material
from tests.calibrate.traces import MASK, make_block, make_trace
from vllm_dllm.calibrate.count import Decoding
from vllm_dllm.calibrate.simulate import draft_blocks
from vllm_dllm.config import DllmConfig
from vllm_dllm.draft.graph import DraftGraph
from vllm_dllm.errors import ConfigError

TEXT, CONFIDENCE = [10, 11, 12, 13, 14], [0.9, 0.8, 0.7, 0.6, 0.5]
ONE_BY_ONE, AT_ONCE = [[0], [1], [2], [3], [4]], [[0, 1, 2, 3, 4]]
CHAIN = DraftGraph((((0, 0),), ((0, 0), (1, 0))), 1)


def block(steps, wrong=()):
    return make_block(TEXT, steps, CONFIDENCE, wrong=wrong)


@pytest.mark.parametrize(
    ("blocks", "budget", "expected"),
    [
        ([block(ONE_BY_ONE)] * 3, 0, (15, 13)),  # each but the first begins one step later
        ([block(ONE_BY_ONE)] * 3, 2, (9, 7)),  # a first step, three drafted ones, a last one
        ([block(ONE_BY_ONE, wrong=[4]), block(ONE_BY_ONE)], 0, (10, 10)),  # another end than foreseen
        ([block(ONE_BY_ONE, wrong=[0]), block(ONE_BY_ONE)], 0, (10, 9)),  # known when the end is guessed
        ([block(AT_ONCE), block(ONE_BY_ONE)], 0, (6, 6)),  # nothing is known before a first step
        ([block(ONE_BY_ONE), block(AT_ONCE), block(ONE_BY_ONE)], 0, (11, 10)),
    ],
)
def test_forwards(blocks, budget, expected):
    traces = [make_trace(*blocks)]
    drafts = draft_blocks(CHAIN, traces, Decoding(MASK))
    assert count_across(traces, drafts, budget, MASK) == expected


def test_another_trace_begins_anew():
    traces = [make_trace(block(ONE_BY_ONE)), make_trace(block(ONE_BY_ONE))]
    assert count_across(traces, draft_blocks(CHAIN, traces, Decoding(MASK)), 0, MASK) == (10, 10)


def test_rows_compare_with_two_more_drafts():
    traces = [make_trace(*[block(ONE_BY_ONE)] * 2, prompt_idx=i) for i in range(2)]
    material = Material(traces[:1], traces[1:], DllmConfig(block_length=5), Decoding(MASK))
    assert rows(material, None)[0] == (3, 10 / 4, 10 / 4, 10 / 3)  # at budget 3 a block takes a first step and one more
    assert rows(material, TEXT[2])[0] == (3, 5 / 2, 5 / 2, 5 / 2)  # the text ends in its first block


def test_traces_of_a_temperature_are_refused():
    traces = [make_trace(block(ONE_BY_ONE))] * 2
    material = Material(traces[:1], traces[1:], DllmConfig(block_length=5), Decoding(MASK, temperature=0.7))
    with pytest.raises(ConfigError, match="temperature 0"):
        rows(material, None)
