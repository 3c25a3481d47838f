"""Who may take a step behind one that is under way, and which of these are void."""

from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams

from vllm_dllm.config import DllmConfig
from vllm_dllm.engine.run_ahead import RunAhead
from vllm_dllm.unmask.schedule import UnmaskRules

B = 8


def request(**options: Any) -> Any:
    extra = {f"dllm_{name}": value for name, value in options.items()}
    params = SamplingParams(max_tokens=16, temperature=0, extra_args=extra)
    return SimpleNamespace(request_id="a", sampling_params=params, num_prompt_tokens=5)


def report(unmasked: int, finished: int = 0) -> Any:
    return SimpleNamespace(unmasked=unmasked, finished=finished)


def rule(rules: UnmaskRules | None = None) -> RunAhead:
    return RunAhead(DllmConfig(block_length=B), rules or UnmaskRules(), 64)


def test_a_step_follows_one_that_leaves_a_mask_for_certain() -> None:
    ahead, each = rule(), request(policy="static", steps=8)  # two blocks of four steps, two positions each
    assert ahead.may_go_on(each)
    ahead.scheduled(each, num_drafts=0)
    ahead.scheduled(each, num_drafts=1)
    assert ahead.may_go_on(each), "6 of 8"
    assert ahead.reported("a", report(2))
    ahead.scheduled(each, num_drafts=0)
    assert not ahead.may_go_on(each), "2 + 4 + 2"
    ahead.reported("a", report(2))
    assert ahead.may_go_on(each), "the draft did not come true"
    ahead.scheduled(each, num_drafts=0)
    assert not ahead.may_go_on(each)
    ahead.reported("a", report(2))
    assert ahead.reported("a", report(2, finished=1))
    assert ahead.may_go_on(each), "the next block is begun"


@pytest.mark.parametrize("policy", ["threshold", "factor", "dynamic", "credit", "entropy_bounded", "origin"])
def test_where_any_step_may_end_the_block_the_steps_so_far_say_how_likely_it_is(policy: str) -> None:
    ahead, each = rule(), request(policy=policy)
    ahead.scheduled(each, num_drafts=0)
    assert not ahead.may_go_on(each), "nothing is known"
    ahead.reported("a", report(1))
    ahead.scheduled(each, num_drafts=0)
    assert ahead.may_go_on(each), "one a step, and seven are left"
    ahead.reported("a", report(5))
    ahead.scheduled(each, num_drafts=0)
    assert not ahead.may_go_on(each), "three a step, and two are left"


def test_steps_that_unmask_ever_more_are_bounded_by_the_largest() -> None:
    ahead, each = rule(UnmaskRules("timesteps")), request(policy="static", steps=6)
    ahead.scheduled(each, num_drafts=0)
    assert ahead.may_go_on(each), "2, 2 and 4 positions are steps"
    ahead.scheduled(each, num_drafts=0)
    assert not ahead.may_go_on(each)


def test_what_was_scheduled_behind_the_end_of_a_block_is_void() -> None:
    ahead, each = rule(), request(policy="threshold")
    for _ in range(3):
        ahead.scheduled(each, num_drafts=0)
    assert ahead.reported("a", report(3))
    assert ahead.reported("a", report(5, finished=1))
    assert not ahead.is_ahead(each), "the void one ends nothing"
    ahead.scheduled(each, num_drafts=0)
    assert not ahead.reported("a", report(0))
    assert ahead.reported("a", report(8, finished=1))


def test_a_preempted_request_begins_anew_and_its_reports_come_still() -> None:
    ahead, each = rule(), request(policy="threshold")
    ahead.scheduled(each, num_drafts=0)
    ahead.preempted("a")
    assert ahead.may_go_on(each)
    ahead.scheduled(each, num_drafts=0)
    assert ahead.reported("a", report(8, finished=1))
    assert ahead.reported("a", report(2)), "this is no step behind that end"
    ahead.freed("a")
    assert not ahead.known
    assert not ahead.reported("a", report(1))


def test_a_block_has_fewer_masks_where_something_is_given() -> None:
    ahead, each = rule(), request(policy="static", steps=8)
    each.sampling_params.extra_args["vllm_dllm_pins"] = [7, -1, 7, 7, -1, 7, -1, 7, *[7] * 8]
    each.num_tokens = 5
    ahead.scheduled(each, num_drafts=0)  # two of three
    assert ahead.may_go_on(each)
    ahead.scheduled(each, num_drafts=0)
    assert not ahead.may_go_on(each), "four of three"
    ahead.reported("a", report(2))
    ahead.reported("a", report(1, finished=1))
    ahead.scheduled(each, num_drafts=0)
    assert not ahead.may_go_on(each), "the next block is given whole"
