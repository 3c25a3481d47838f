"""What an order ranker saves, counted on hand-made traces."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.ablations.drafting import BUDGETS, Material
from benchmarks.ablations.ranker import Drafters, forwards, interval, last_held_out, report
from tests.calibrate.traces import MASK, random_trace
from vllm_dllm.calibrate.build import make_graph
from vllm_dllm.calibrate.count import Decoding
from vllm_dllm.calibrate.simulate import count_forwards, draft_blocks
from vllm_dllm.config import DllmConfig
from vllm_dllm.draft.ranker import OrderRanker
from vllm_dllm.errors import ConfigError


@pytest.fixture(scope="module")
def material() -> Material:
    rng = np.random.default_rng(3)
    traces = [random_trace(rng, prompt_idx=i) for i in range(9)]
    settings = DllmConfig(block_length=8, policy="static")
    return last_held_out(Material(traces[4:], traces[:4], settings, Decoding(MASK)), 2)


def test_the_last_prompts_are_held_out(material: Material) -> None:
    assert [trace.prompt_idx for trace in material.used] == list(range(7))
    assert [trace.prompt_idx for trace in material.held_out] == [7, 8]
    for count in (0, 9):
        with pytest.raises(ConfigError, match=f"--last is {count}, allowed are 1..8 of the 9 prompts"):
            last_held_out(material, count)


def test_forwards_of_prompts_add_up_to_those_of_all(material: Material) -> None:
    graph = make_graph(material.used, material.decoding, material.settings, 32)
    blocks = draft_blocks(graph, material.held_out, material.decoding)
    for budget, counts in zip(BUDGETS, forwards(graph, material.held_out, material.decoding), strict=True):
        assert counts.shape == (2, 2)
        ratio, low, high = interval(counts)
        assert ratio == pytest.approx(count_forwards(blocks, budget).ratio_of_steps)
        assert low <= ratio <= high


def test_prompts_that_are_alike_leave_no_doubt() -> None:
    assert interval(np.array([[30, 10]] * 5)) == (3.0, 3.0, 3.0)


def test_the_report(material: Material) -> None:
    lines = list(report(material))
    assert [line.split("|")[1].strip() for line in lines[2:5]] == ["off", "on", "off / on"]
    assert lines[6].startswith("The readiest position comes next: 0.")
    with pytest.raises(ConfigError, match="policy 'random', whose order is known"):
        list(report(replace(material, decoding=Decoding(MASK, is_random=True))))


def test_other_traces_are_measured_with_the_same_drafters(material: Material) -> None:
    hot = Decoding(MASK, temperature=0.7)
    same = Material(material.held_out[:1], material.held_out[1:], material.settings, material.decoding)
    lines = list(report(material, [("same", same), ("hot", replace(same, decoding=hot))]))
    first, second = lines.index("same: 2 prompts, temperature 0"), lines.index("hot: 2 prompts, temperature 0.7")
    assert lines[first + 2 : first + 7] == lines[:5], "the prompts that are held out, once more"
    assert lines[second + 2 : second + 4] == lines[:2]
    plain = make_graph(material.used, material.decoding, material.settings, 32)
    drafters = Drafters(plain, plain, OrderRanker().eval())
    assert next(drafters.rows(material.held_out, material.decoding)) == lines[2]
    assert next(drafters.rows(material.held_out, hot)) == lines[second + 4]


def test_others_under_other_settings_are_refused(material: Material) -> None:
    other = replace(material, settings=DllmConfig(block_length=8, policy="threshold"))
    with pytest.raises(ConfigError, match=r"^code has traces of .*threshold.*, allowed are those of"):
        list(report(material, [("code", other)]))
    with pytest.raises(ConfigError, match="code has traces of another under"):
        list(report(material, [("code", replace(material, model="another"))]))
