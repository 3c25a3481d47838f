"""What FreeCache and dInfer's vicinity refresh compute, step by step, and what a canvas is evaluated with."""

import numpy as np
import pytest

from vllm_dllm.config import DllmConfig
from vllm_dllm.names import DELAYED
from vllm_dllm.state.kv import KvSchedule, KvStep
from vllm_dllm.state.windows import make_schedule

B, PROMPT, END = 4, 9, 25


def steps(kv: KvSchedule, starts: list[int], end: int = END) -> list[KvStep]:
    """Take the steps of a request whose blocks begin so, one after another."""
    if 0 not in kv.known:
        kv.add(0, 0, PROMPT)
    made = []
    for start in starts:
        made.append(kv.step([0], np.array([start]), np.array([end])))
        kv.note(0, start)
    return made


def stored(made: list[KvStep]) -> list[tuple[int, int] | None]:
    return [(int(m.begin[0]), int(m.end[0])) if m.end[0] > m.begin[0] else None for m in made]


def spans(made: list[KvStep]) -> list[tuple[int, int]]:
    return [(int(m.span_begin[0]), int(m.span_end[0])) for m in made]


@pytest.mark.parametrize("shift", [0, 1])
def test_freecache_goes_over_no_position_before_the_block_that_ended(shift: int) -> None:
    kv = KvSchedule("freecache", None, B, logit_shift=bool(shift))
    made = steps(kv, [9, 9, 13, 13, 17, 17])
    assert stored(made) == [(0, END), None, (9 - shift, END), None, (13 - shift, END), None]
    assert spans(made)[1::2] == [(9 - shift, END), (13 - shift, END), (17 - shift, END)]
    assert [bool(m.is_undrafted[0]) for m in made] == [True, False] * 3
    assert [int(kv.num_rows(m)[0]) for m in made] == [25, 16 + shift, 16 + shift, 12 + shift, 12 + shift, 8 + shift]


def test_freecache_keeps_the_last_blocks_steps_as_short_as_the_block() -> None:
    """Such a step has the shape of a captured graph."""
    made = steps(KvSchedule("freecache", None, B), [21, 21])
    assert (spans(made)[1], bool(made[1].is_long[0])) == ((21, END), False)
    assert bool(steps(KvSchedule("freecache", None, B), [17, 17])[1].is_long[0])
    assert bool(steps(KvSchedule("freecache", None, B, logit_shift=True), [21, 21])[1].is_long[0])


def test_vicinity_takes_all_when_a_block_begins_and_in_the_first_ones_warmup_steps() -> None:
    kv = KvSchedule("vicinity", None, B, vicinity=(5, 2, 2))
    made = steps(kv, [9] * 4 + [13] * 3 + [21] * 2)
    whole = (0, END)
    assert stored(made) == [whole, whole, whole, None, whole, None, None, whole, None]
    assert (spans(made)[3], spans(made)[5], spans(made)[8]) == ((4, 15), (8, 19), (16, END))
    assert [bool(m.is_undrafted[0]) for m in made] == [True, True, True, False, True, False, False, True, False]
    assert [int(kv.num_rows(m)[0]) for m in made[2:5]] == [25, 11, 25]
    assert spans(steps(KvSchedule("vicinity", None, B, vicinity=(16, 0, 0)), [9, 9])) == [(0, 13)] * 2


def test_who_comes_back_in_its_first_block_warms_up_again() -> None:
    kv = KvSchedule("vicinity", None, B, vicinity=(5, 2, 1))
    steps(kv, [9, 9, 9])
    kv.add(0, 0, PROMPT)
    assert stored(steps(kv, [9, 9, 9])) == [(0, END), (0, END), None]
    kv.add(0, 0, PROMPT)
    assert stored(steps(kv, [13, 13])) == [(0, END), None]


def test_canvases_of_the_other_policies_are_blocks() -> None:
    for name in ("dual", "prefix", "block_causal", "causal"):
        kv = KvSchedule(name, None, B)  # type: ignore[arg-type]
        made = steps(kv, [8, 8])
        assert (spans(made), [bool(m.is_wide[0]) for m in made]) == ([(8, 12)] * 2, [False] * 2)


def test_a_servers_settings_reach_the_schedule() -> None:
    made = make_schedule(DllmConfig(kv_policy="vicinity", after_look=3), stores_alone=False, logit_shift=True)
    assert (made.name, made.vicinity, made.logit_shift) == ("vicinity", (16, 3, 4), True)


def test_a_step_may_store_what_the_policy_computes_anew() -> None:
    free = KvSchedule("freecache", None, B, logit_shift=True)
    assert free.may_store(13, END, PROMPT, begins_block=True) == (END, END - 8)
    assert free.may_store(13, END, PROMPT, begins_block=False) == (0,)
    dual = KvSchedule("dual", None, B)
    assert dual.may_store(13, END, PROMPT, begins_block=True) == (END,)
    assert dual.may_store(13, END, PROMPT, begins_block=False) == (0, END, END - 13)


@pytest.mark.parametrize(("shift", "whole"), [(False, [0, 1, 3, 6, 7, 8]), (True, [0, 3, 6, 7])])
def test_dkv_takes_all_at_every_nth_step_and_else_the_block_and_what_follows(shift: bool, whole: list[int]) -> None:
    """Without a shift the step behind the first of a block takes all, too."""
    kv = KvSchedule("dkv", 3, B, logit_shift=shift)
    made = steps(kv, [9] * 7 + [13] * 3)
    assert [n for n, m in enumerate(made) if not m.is_delayed[0]] == whole
    for n, m in enumerate(made):
        start = (9 if n < 7 else 13) - shift
        assert stored([m]) == [(0, END) if n in whole else (start, END)]
        assert bool(m.is_long[0])
    assert {*kv.may_store(9, END, PROMPT, begins_block=True)} == {END}
    assert kv.may_store(9, END, PROMPT, begins_block=False) == (END, END - 9 + shift)


@pytest.mark.parametrize(("shift", "whole"), [(False, [0, 1, 3, 6, 7, 8]), (True, [0, 3, 6, 7])])
def test_dkv_pd_takes_the_prompt_once(shift: bool, whole: list[int]) -> None:
    """With a shift the prompt's last row predicts the reply's first position, and is taken again."""
    kv = KvSchedule("dkv_pd", 3, B, logit_shift=shift)
    made = steps(kv, [9] * 7 + [13] * 3)
    assert [n for n, m in enumerate(made) if not m.is_delayed[0]] == whole
    for n, m in enumerate(made):
        refreshed = (PROMPT - shift if n else 0, END)
        assert stored([m]) == [refreshed if n in whole else ((9 if n < 7 else 13) - shift, END)]
    assert kv.may_store(13, END, PROMPT, begins_block=True) == (END, END - PROMPT + shift)
    assert kv.may_store(13, END, PROMPT, begins_block=False) == (END - PROMPT + shift, END - 13 + shift)


def test_the_published_interval_of_dkv_is_the_default() -> None:
    for name in DELAYED:
        assert [DllmConfig(kv_policy=name, refresh_every=n).interval for n in (None, 3)] == [8, 3]
    assert make_schedule(DllmConfig(kv_policy="dkv"), stores_alone=False).refresh_every == 8
    assert DllmConfig().interval is None
