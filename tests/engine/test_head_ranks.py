"""Ranks that reduce their own part of the vocabulary and merge some numbers of each row say what one rank says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.engine import head_ranks
from vllm_dllm.unmask.stats import torch_stats

pytestmark = [pytest.mark.slow("ranks"), pytest.mark.xdist_group("both cores")]


def test_merged_parts_equal_the_whole_vocabulary(tmp_path: Path) -> None:
    """By the weight, and by logits that vLLM's processor scales, as a GPU's or a quantised head's are made."""
    command = [sys.executable, "-m", head_ranks.__name__]
    env = os.environ | {"VLLM_DIST_IDENT": f"heads{os.getpid()}"}  # names the shared memory of vLLM's CPU ranks
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path)], env=env) for rank in range(head_ranks.NUM_RANKS)]
    assert [rank.wait() for rank in ranks] == [0] * head_ranks.NUM_RANKS
    weight, hidden, samplings = head_ranks.inputs()
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(head_ranks.NUM_RANKS))
    scales = [1.0, head_ranks.SCALE]
    cases = [(scale, sampling) for scale in scales for sampling in samplings]
    assert len(first) == len(cases)
    for (scale, sampling), found, same in zip(cases, first, second, strict=True):
        logits = scale * (hidden @ weight.t())
        expected = torch_stats(logits, excluded_ids=[head_ranks.MASK], num_candidates=3, sampling=sampling)
        assert found.keys() == same.keys()
        for name, value in found.items():
            wanted = getattr(expected, name)
            assert (value is None) == (wanted is None), name
            if value is not None:
                assert torch.equal(value, same[name]), name
                torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-4, msg=name)
