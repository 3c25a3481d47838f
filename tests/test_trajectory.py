"""Trajectories are the reference's steps, with drafts and without, beside other requests; a file gives back what it was
given.
"""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.draft.test_exact import DREAM, LLADA, MASK, SDAR, graphs
from tests.unmask.edited import BlockModel, answers
from tests.unmask.test_edits import NUM_BLOCKS, edited_requests
from vllm_dllm.errors import ConfigError
from vllm_dllm.trajectory import GIVEN, StepRecorder, Trajectory, read_trajectories, write_trajectories
from vllm_dllm.unmask.schedule import UnmaskRules


def reference_steps(history: torch.Tensor, prompt_len: int, block_length: int) -> list[int]:
    """Number the steps [num_steps, gen_length] of a reference's history anew in each block."""
    first = (history != MASK).int().argmax(0).tolist()
    steps: list[int] = []
    for place, step in enumerate(first):
        block = [
            s for p, s in enumerate(first) if (prompt_len + p) // block_length < (prompt_len + place) // block_length
        ]
        steps.append(step - (max(block) + 1 if block else 0))
    return steps


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    block_length=st.sampled_from([1, 4, 5]),
    sharpness=st.sampled_from([0.0, 3.0, 12.0]),
    is_native=st.booleans(),
    rules=st.sampled_from([LLADA, DREAM, SDAR]),
)
def test_steps_are_those_of_the_reference(
    data: st.DataObject, block_length: int, sharpness: float, is_native: bool, rules: UnmaskRules
) -> None:
    model = BlockModel(block_length, data.draw(st.integers(0, 99)), sharpness)
    requests = data.draw(st.lists(edited_requests(block_length, rules), min_size=1, max_size=4))
    graph, budget = data.draw(graphs(block_length)), data.draw(st.integers(1, 12))
    for drafts, num_drafts in ((None, 0), (graph, min(budget, len(graph)))):
        recorder = StepRecorder(str)
        common = {"is_native": is_native, "rules": rules, "observer": recorder.observe}
        answers(model, requests, drafts, num_drafts, NUM_BLOCKS, **common)  # type: ignore[arg-type]
        for slot, request in enumerate(requests):
            steps = recorder.take(lambda name, slot=slot: name == str(slot))  # type: ignore[misc]
            expected = reference_steps(
                request.generation(model, NUM_BLOCKS, rules).history, len(request.prompt), block_length
            )
            assert [steps[len(request.prompt) + place] for place in range(len(expected))] == expected
            assert all(steps.get(place, GIVEN) == GIVEN for place in range(len(request.prompt)))
            with pytest.raises(KeyError):
                recorder.take(lambda name, slot=slot: name == str(slot))  # type: ignore[misc]


def test_a_file_gives_back_what_it_was_given(tmp_path: Path) -> None:
    path = tmp_path / "trajectories.jsonl"
    own = [
        Trajectory("0", 0, [5, 6], [7, 8], [2, 2], [1, 0], [-0.25, -1e-9]),
        Trajectory("1", 1, [5], [9], [1], [GIVEN], [0.0]),
    ]
    write_trajectories(path, own)
    assert read_trajectories(path) == own
    for line, message in (("{", "line 3 is no JSON"), ('{"request": "1"}', "line 3 is .* allowed is an object with")):
        path.write_text("".join(f"{each}\n" for each in [*path.read_text().splitlines()[:2], line]))
        with pytest.raises(ConfigError, match=message):
            read_trajectories(path)
