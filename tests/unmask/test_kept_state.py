"""What policies keep of a request, over preemptions."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from tests.draft.test_exact import VOCAB
from tests.unmask.test_user_policy import LENGTH, count
from tests.unmask.test_user_policy import install as install
from vllm_dllm.engine.report import StepOrder
from vllm_dllm.engine.sampler import DllmSampler
from vllm_dllm.state.apart import ApartState
from vllm_dllm.unmask.memory import StateField
from vllm_dllm.unmask.torch_policy import TorchPolicy


class Counted:
    """What a policy keeps of requests that count their steps, of blocks of `LENGTH` positions from 0 on."""

    def __init__(self, install: Callable[..., None]) -> None:
        per_request = StateField(1, torch.int64, 0, per="request")
        install(faster=TorchPolicy(count, state={"count": per_request}))
        self.state = ApartState(3, LENGTH, torch.device("cpu"), VOCAB, {})
        self.start = dict.fromkeys(range(3), 0)  # by slot

    def put(self, slot: int, request_id: str, start: int = 0, name: str | None = "faster") -> None:
        if start == 0:
            self.state.forget([request_id])
        self.state.put(slot, name, (), request_id, start)
        self.start[slot] = start

    def step(self, slot: int, *, ends: bool = False) -> int:
        """Take a step, which may end a block; returns how many there were."""
        slots = torch.tensor([slot])
        own = self.state.state("faster", slots)
        after, is_finished = {**own, "count": own["count"] + 1}, torch.tensor([ends])
        self.state.keep("faster", slots, after, is_finished)
        behind = self.start[slot] + LENGTH
        self.state.keep_ended("faster", slots, after, is_finished, torch.tensor([behind]))
        self.start[slot] = behind if ends else self.start[slot]
        return int(own["count"])


def test_what_is_kept_of_a_request_outlives_a_preemption(install: Callable[..., None]) -> None:
    """It comes back as it was when the unfinished block began, in whichever slot, and nobody else finds it."""
    made = Counted(install)
    made.put(0, "a")
    assert [made.step(0), made.step(0, ends=True), made.step(0), made.step(0)] == [0, 1, 2, 3]
    made.put(2, "a", LENGTH)  # before its slot was anybody's
    assert [made.step(2), made.step(2)] == [2, 3]
    made.put(2, "b")
    assert made.step(2, ends=True) == 0
    made.put(2, "a", LENGTH)
    assert made.step(2, ends=True) == 2
    made.put(2, "c", name=None)
    made.put(1, "a", 2 * LENGTH)
    assert made.step(1) == 3
    made.put(0, "b", LENGTH)
    assert made.step(0) == 1


@pytest.mark.parametrize("num_blocks", [1, 2])
def test_what_is_kept_of_a_request_is_of_blocks_that_the_scheduler_knows(
    install: Callable[..., None], num_blocks: int
) -> None:
    """Steps under way may end blocks of a request that it preempts, and that it decides anew then."""
    made = Counted(install)
    made.put(0, "a")
    assert [made.step(0, ends=True), made.step(0)] == [0, 1]
    for number in range(num_blocks):
        assert made.step(0, ends=True) == 2 + number
    made.put(0, "a", LENGTH)
    assert [made.step(0), made.step(0, ends=True)] == [1, 2]
    made.put(1, "a", 2 * LENGTH)
    assert made.step(1) == 3


def test_what_is_kept_of_a_request_waits_as_long_as_it_does(install: Callable[..., None]) -> None:
    """A request of low priority comes back behind any number of others; those that ended leave nothing."""
    made = Counted(install)
    made.put(0, "a")
    assert made.step(0, ends=True) == 0
    for number in range(1000):
        made.put(0, f"other {number}")
        assert made.step(0, ends=True) == 0
        made.state.forget({f"other {number}", "unknown"})
    made.put(0, "a", LENGTH)
    assert made.step(0) == 1
    made.put(0, "b", name=None)
    made.state.forget({"a"})
    assert not made.state.remembered


def test_an_id_that_is_used_again_finds_nothing_of_the_one_before(install: Callable[..., None]) -> None:
    """In the step in which that one ends, too: vLLM adds requests before the sampler learns who has ended."""
    made = Counted(install)
    made.put(0, "a")
    assert [made.step(0, ends=True), made.step(0)] == [0, 1]
    made.put(1, "a")
    assert [made.step(1, ends=True), made.step(1)] == [0, 1]
    made.put(2, "a", LENGTH)
    assert made.step(2) == 1


def test_an_id_is_forgotten_where_the_step_does_not_use_it_again(install: Callable[..., None]) -> None:
    made = Counted(install)
    sampler = DllmSampler(SimpleNamespace(state=SimpleNamespace(apart=made.state)))
    for slot, request_id in enumerate(("a", "b")):
        made.put(slot, request_id)
        assert made.step(slot, ends=True) == 0
    made.put(0, "a")  # the one before has ended
    sampler.take_order(StepOrder(("a",), None, ended={"a", "b"}))
    assert made.state.remembered == {"a"}
    assert [made.step(0, ends=True), made.step(0)] == [0, 1]
    made.put(2, "a", LENGTH)
    assert made.step(2) == 1
