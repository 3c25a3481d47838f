"""Trajectories of an engine are the reference's steps, with drafts, without, and after preemptions, in fp32."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams

from tests.e2e.rig import Case, Oracle, mixed_cases, random_graph, shared_engine, speculation
from tests.unmask.torch_policies import net_files
from vllm_dllm.engine.trajectories import TrajectoryRecorder
from vllm_dllm.errors import ConfigError
from vllm_dllm.trajectory import GIVEN, Trajectory

pytestmark = [pytest.mark.engine, pytest.mark.xdist_group("policies in torch code")]

BLOCK = 8
SETTINGS = {"block_length": BLOCK, **net_files(BLOCK)}


@pytest.fixture
def llm(mild: Path) -> Any:
    """The engine of `test_torch_policies`."""
    config = speculation(random_graph(12, 12, 8), 5)
    return shared_engine(mild, SETTINGS, speculative_config=config, max_model_len=1024, max_num_batched_tokens=8192)


@pytest.fixture
def recorder(llm: Any) -> Iterator[TrajectoryRecorder]:
    own = TrajectoryRecorder(llm)
    yield own
    own.close()


def run(llm: Any, cases: list[Case], preempt_at: tuple[int, ...] = (), **options: Any) -> list[Any]:
    """Run cases by single steps, in order; returns the finished outputs."""
    engine, outputs, number = llm.llm_engine, {}, 0
    for i, case in enumerate(cases):
        params = case.sampling_params(logprobs=0)
        params.extra_args |= options
        engine.add_request(f"r-{i}", {"prompt_token_ids": list(case.prompt)}, params)
    while engine.has_unfinished_requests():
        number += 1
        if number in preempt_at:
            assert llm.llm_engine.reset_prefix_cache(reset_running_requests=True)
        outputs |= {each.request_id: each for each in engine.step() if each.finished}
    return [outputs[f"r-{i}"] for i in range(len(cases))]


def check(own: Trajectory, case: Case, oracle: Oracle) -> None:
    expected = oracle.generation(case, SETTINGS)
    mask, length = oracle.model.config.mask_token_id, case.max_tokens
    assert (own.prompt_token_ids, own.token_ids) == (list(case.prompt), oracle.tokens(case, SETTINGS))
    first = (expected.history != mask).int().argmax(0).tolist()
    begins = [place - place % BLOCK for place in range(length)]
    assert own.block_start == [len(case.prompt) + begin for begin in begins]
    before = [max(first[begin - BLOCK : begin]) + 1 if begin else 0 for begin in begins]
    assert own.step == [step - b for step, b in zip(first, before, strict=False)]
    log_probs = [float(row[token]) for row, token in zip(expected.log_probs, own.token_ids, strict=False)]
    assert own.logprob == pytest.approx(log_probs, abs=2e-3)


def test_they_are_the_references_with_drafts_and_without(
    llm: Any, recorder: TrajectoryRecorder, mild_oracle: Oracle
) -> None:
    cases = mixed_cases(BLOCK, seed=12)[:8]
    outputs = run(llm, cases)
    assert sum(output.kv_transfer_params["dllm"]["accepted"] for output in outputs) >= 4
    drafted = recorder.take(outputs)
    for own, case in zip(drafted, cases, strict=True):
        check(own, case, mild_oracle)
    plain = recorder.take(run(llm, cases, dllm_speculation=False))
    preempted = recorder.take(run(llm, cases, (4, 9, 17)))
    for others in (plain, preempted):
        assert [(o.token_ids, o.step, o.block_start) for o in others] == [
            (o.token_ids, o.step, o.block_start) for o in drafted
        ]


def test_several_replies_of_a_request_and_what_was_given(llm: Any, recorder: TrajectoryRecorder) -> None:
    params = SamplingParams(n=2, temperature=0.8, seed=1, max_tokens=12, ignore_eos=True, logprobs=0)
    (output,) = llm.generate([{"prompt_token_ids": [5, 6, 7]}], params, use_tqdm=False)
    own = recorder.take([output])
    assert [each.index for each in own] == [0, 1]
    assert [each.token_ids for each in own] == [list(each.token_ids) for each in output.outputs]
    assert all(GIVEN not in each.step and min(each.step) == 0 for each in own)
    given = Case((5, 6, 7), 10, given=(9, None, None, 11, *[None] * 6))
    (its,) = recorder.take(run(llm, [given]))
    assert [step == GIVEN for step in its.step] == [i in (0, 3) for i in range(10)]
    assert (its.logprob[0], its.logprob[3]) == (0.0, 0.0)


def test_what_has_no_trajectory_is_refused(llm: Any, recorder: TrajectoryRecorder) -> None:
    prompt = {"prompt_token_ids": [5]}
    (output,) = llm.generate([prompt], Case((5,), 4).sampling_params(), use_tqdm=False)
    with pytest.raises(ConfigError, match=r"no log-probabilities.*give SamplingParams\(logprobs=0\)"):
        recorder.take([output])
    (output,) = llm.generate([prompt], Case((5,), 4).sampling_params(logprobs=0), use_tqdm=False)
    recorder.take([output])
    with pytest.raises(ConfigError, match=r"no step of request \d+ was recorded; make the TrajectoryRecorder before"):
        recorder.take([output])
