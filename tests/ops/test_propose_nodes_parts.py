"""`propose_nodes` where a block's parts come one after another: guesses stay in the leftmost one that has masks."""

from dataclasses import fields, replace

import pytest
import torch

from tests.ops import simt
from tests.ops.test_propose_nodes import STEPS, case, check_equal, drafts_of
from vllm_dllm.draft.propose import Drafts
from vllm_dllm.unmask.schedule import UnmaskRules


@pytest.mark.parametrize("is_noisy", [False, True], ids=["greedy", "noisy"])
@pytest.mark.parametrize("part", [1, 3, 8])
def test_guesses_stay_in_the_leftmost_part_that_has_masks(part, is_noisy):
    num_valid = 0
    for seed in range(6):
        given = replace(case(33, STEPS[seed % 3], seed, is_noisy=is_noisy), sub_block_length=part)
        is_open = UnmaskRules(sub_block_length=part).open(given.roots.is_masked)
        drafts = check_equal(given, len(given.graph), "cpu", replace(given.roots, is_masked=is_open))
        for where in simt.PLACES[1:]:
            by_cuda = drafts_of(given, len(given.graph), where)
            assert all(torch.equal(getattr(by_cuda, f.name), getattr(drafts, f.name)) for f in fields(Drafts))
        changed = drafts.canvas != given.roots.canvas[:, None]
        assert not (changed & ~is_open[:, None] & drafts.is_valid[..., None]).any()
        num_valid += int(drafts.is_valid.sum())
    assert num_valid > 0 or part == 1  # the only draft of one position would finish it
