"""Traces on disk, and steps of several requests put together into blocks."""

import numpy as np
import pytest

from tests.calibrate.traces import MASK, make_block, make_trace, random_trace
from vllm_dllm.calibrate.record import BlockRecorder, TraceFile
from vllm_dllm.calibrate.trace import pack, unpack
from vllm_dllm.errors import ConfigError

SETTINGS = {"model": "tiny", "seed": 0, "threshold": 0.9}


def some_traces(count):
    rng = np.random.default_rng(0)
    return [random_trace(rng, prompt_idx=i) for i in range(count)]


def same(first, second):
    return pack(first) == pack(second)


def test_packing_returns_the_trace():
    [trace] = some_traces(1)
    found = unpack(pack(trace))
    assert (found.prompt_idx, found.seed, len(found.blocks)) == (trace.prompt_idx, trace.seed, len(trace.blocks))
    for block, expected in zip(found.blocks, trace.blocks, strict=True):
        assert block.start == expected.start
        assert block.log_probs.dtype == np.float64
        np.testing.assert_array_equal(block.canvas, expected.canvas)
        np.testing.assert_array_equal(block.token_ids, expected.token_ids)
        np.testing.assert_array_equal(block.log_probs, expected.log_probs)


def test_an_interrupted_run_goes_on(tmp_path):
    path, traces = tmp_path / "graph.json.traces", some_traces(3)
    with TraceFile(path, SETTINGS) as file:
        for trace in traces[:2]:
            file.append(trace)
    with TraceFile(path, SETTINGS) as file:
        assert sorted(file.traces) == [0, 1]
        file.append(traces[2])
    with TraceFile(path, SETTINGS) as file:
        assert all(same(file.traces[i], traces[i]) for i in range(3))
        file.remove()
    assert not path.exists()


@pytest.mark.parametrize("lost", [1, 2, 500])
def test_a_line_that_was_cut_short_is_dropped(tmp_path, lost):
    path, traces = tmp_path / "graph.json.traces", some_traces(2)
    with TraceFile(path, SETTINGS) as file:
        for trace in traces:
            file.append(trace)
    path.write_bytes(path.read_bytes()[:-lost])
    with TraceFile(path, SETTINGS) as file:
        assert sorted(file.traces) == [0]
        file.append(traces[1])
    with TraceFile(path, SETTINGS) as file:
        assert same(file.traces[1], traces[1])


def test_a_header_that_was_cut_short_begins_anew(tmp_path):
    path = tmp_path / "graph.json.traces"
    path.write_text('{"settings": {"mo')
    with TraceFile(path, SETTINGS) as file:
        assert file.traces == {}
    assert path.read_text().endswith("}\n")


def test_traces_of_other_settings_are_refused(tmp_path):
    path = tmp_path / "graph.json.traces"
    with TraceFile(path, SETTINGS):
        pass
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"with threshold 0\.9, but now threshold is 0\.8; run it with the same"):
        TraceFile(path, SETTINGS | {"threshold": 0.8})
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", ["hello\n", "[1]\n", "{}\n"])
def test_another_file_is_refused(tmp_path, content):
    path = tmp_path / "graph.json.traces"
    path.write_text(content)
    with pytest.raises(ConfigError, match="is not a file of traces"):
        TraceFile(path, SETTINGS)
    assert path.read_text() == content


@pytest.mark.parametrize(
    "damage", [lambda text: text[:-5], lambda text: text[:40] + text[60:], lambda text: "", str.upper]
)
def test_a_damaged_line_is_named(tmp_path, damage):
    path = tmp_path / "graph.json.traces"
    with TraceFile(path, SETTINGS) as file:
        for trace in some_traces(3):
            file.append(trace)
    lines = path.read_text().split("\n")
    lines[2] = damage(lines[2])
    path.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=r"graph\.json\.traces, line 3 is damaged .*; remove this line to decode"):
        TraceFile(path, SETTINGS)
    del lines[2]
    path.write_text("\n".join(lines))
    with TraceFile(path, SETTINGS) as file:
        assert sorted(file.traces) == [0, 2]


def steps_of(block):
    return list(zip(block.canvas[:-1], block.canvas[1:], block.token_ids, block.log_probs, strict=True))


def test_steps_of_interleaved_requests_become_their_blocks():
    first, second = some_traces(2)
    found = []
    recorder = BlockRecorder(MASK, lambda slot, block: found.append((slot, block)))
    for one, other in zip(first.blocks, second.blocks, strict=True):
        for step, other_step in zip(steps_of(one), steps_of(other), strict=True):
            recorder.observe(0, one.start, step)
            recorder.observe(5, other.start, other_step)
    for slot, trace in ((0, first), (5, second)):
        assert same(make_trace(*(block for s, block in found if s == slot), prompt_idx=slot), trace) == (slot == 0)
        assert [block.start for s, block in found if s == slot] == [block.start for block in trace.blocks]


def test_a_preempted_block_is_recorded_from_its_second_beginning():
    block = make_block([50, 51, 52], [[1], [0], [2]], [0.5, 0.9, 0.2])
    found = []
    recorder = BlockRecorder(MASK, lambda slot, block: found.append(block))
    for step in [*steps_of(block)[:2], *steps_of(block)]:
        recorder.observe(0, block.start, step)
    assert same(make_trace(*found), make_trace(block))


def test_a_block_that_one_step_finishes_is_recorded_once():
    block = make_block([50, 51], [[0, 1]], [0.5, 0.9])
    found = []
    recorder = BlockRecorder(MASK, lambda slot, block: found.append(block))
    [step] = steps_of(block)
    recorder.observe(0, block.start, step)
    recorder.observe(0, block.start, (step[1], step[1], *step[2:]))
    assert [block.num_steps for block in found] == [1]


def test_a_block_that_begins_with_the_prompts_end_is_recorded_whole():
    block = make_block([50, 51, 52], [[1], [2]], [0.5, 0.9, 0.2])
    block.canvas[:, 0] = 50
    found = []
    recorder = BlockRecorder(MASK, lambda slot, block: found.append(block))
    for step in [steps_of(block)[0], *steps_of(block)]:  # once before a preemption
        recorder.observe(0, block.start, step)
    assert [one.canvas.tolist() for one in found] == [[[50, MASK, MASK], [50, 51, MASK], [50, 51, 52]]]
