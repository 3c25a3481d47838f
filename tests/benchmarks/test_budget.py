"""The rule of budgets on simulated machines with recorded acceptance: its targets; the simulator counts right."""

from dataclasses import replace

import pytest

from benchmarks.budget.__main__ import loads
from benchmarks.budget.machines import BY_BLOCK, Machine
from benchmarks.budget.recorded import MAX_DRAFTS, Recording, _needs, recordings
from benchmarks.budget.simulate import Phase, outcome, spent_ms
from vllm_dllm.draft.budget import CostCurve

KNOWN = recordings()
GRID = [
    *((32, "CPU, LLaDA 8.5 M", "LLaDA static", load) for load in ("1 at once", "4 at once")),
    (32, "CPU, tiny_llada", "LLaDA static", "4, of two policies"),
    (32, "CPU, forecast while busy", "LLaDA threshold", "4 at once"),
    (32, "CPU, LLaDA 8.5 M", "LLaDA threshold", "4, half never accept"),
    (32, "H200, LLaDA-8B, tiles", "LLaDA threshold", "2 at once"),
    (8, "H200, SDAR-8B, tiles", "SDAR static", "2 at once"),
    (8, "CPU, tiny_sdar", "SDAR static", "1 to 12, changing"),
]


@pytest.mark.parametrize(("block_length", "machine", "name", "load"), GRID)
def test_never_slower_and_near_the_best_number(block_length: int, machine: str, name: str, load: str) -> None:
    other = next(each for each in KNOWN if each != name and KNOWN[each].block_length == block_length)
    found = outcome(BY_BLOCK[block_length][machine], KNOWN, loads(name, other)[load])
    assert found.auto >= 0.99
    assert found.of_best >= 0.95


def test_a_step_takes_what_its_rows_take() -> None:
    """Two blocks of three steps; the first step of each refreshes 40 rows, one draft saves a step of the second."""
    blocks = (((), ()), ((1,), ()))
    recording = Recording(8, is_causal=False, prior=(0.0, 0.5), prompts=(blocks,))
    machine = Machine(CostCurve(((1, 1.0), (1000, 1000.0))), 0.0, 0.5, 40, noise=0.0, accidents=0.0)
    load = [Phase(1, 1, ("a",))]
    assert spent_ms(machine, {"a": recording}, load, 0) == pytest.approx(2 * 48 + 4 * 8 + 6 * 0.5)
    assert spent_ms(machine, {"a": recording}, load, 1) == pytest.approx(2 * 48 + 3 * 16 + 5 * 0.5)
    causal = replace(recording, is_causal=True)
    assert spent_ms(machine, {"a": causal}, load, 0) == pytest.approx(48 + 16 + 4 * 8 + 6 * 0.5), "one commit"
    never = [Phase(1, 1, ("!a",))]
    assert spent_ms(machine, {"a": recording}, never, 1) == pytest.approx(2 * 48 + 4 * 16 + 6 * 0.5)


def test_a_recording_is_read_as_it_was_written() -> None:
    for recording in KNOWN.values():
        assert Recording.read(recording.as_json()) == recording
        assert len(recording.prior) == 1 + MAX_DRAFTS
    assert {need for prompt in KNOWN["SDAR static"].prompts for block in prompt for a in block for need in a} <= {
        *range(1, 1 + MAX_DRAFTS)
    }


def test_a_depth_needs_the_drafts_of_all_before_it() -> None:
    assert _needs([2, 0, 1, 3]) == (3, 3, 4)
    assert _needs([2, 3]) == ()
