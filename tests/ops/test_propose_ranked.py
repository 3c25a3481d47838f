"""What an order ranker adds to readiness: natively as in torch."""

from dataclasses import replace

import pytest
import torch

from tests.ops import simt
from tests.ops.test_propose_nodes import BLOCK_LENGTHS, STEPS, Case, arguments, case, check_equal, drafts_of, found
from vllm_dllm.draft.ranker_shape import REACH
from vllm_dllm.ops import propose_nodes


def ranked(given: Case) -> Case:
    """Add what a ranker may say."""
    generator = torch.Generator().manual_seed(1)
    terms = 3 * torch.randn(*given.roots.canvas.shape, 1 + 2 * REACH, dtype=torch.float64, generator=generator)
    return replace(given, roots=replace(given.roots, terms=terms))


@pytest.mark.parametrize("where", ["cpu", simt.WHERE])
@pytest.mark.parametrize("is_noisy", [False, True], ids=["greedy", "noisy"])
@pytest.mark.parametrize("block_length", BLOCK_LENGTHS)
def test_what_a_ranker_adds_counts_as_in_torch(block_length, is_noisy, where):
    for seed, tokens_per_step in enumerate(STEPS):
        given = ranked(case(block_length, tokens_per_step, seed, is_noisy=is_noisy))
        drafts = check_equal(given, len(given.graph), where)
        plain = drafts_of(replace(given, roots=replace(given.roots, terms=None)), len(given.graph), where)
        assert block_length <= 4 or not torch.equal(drafts.canvas, plain.canvas)


@pytest.mark.slow("kernels")
@pytest.mark.parametrize("is_noisy", [False, True], ids=["greedy", "noisy"])
@pytest.mark.parametrize("block_length", BLOCK_LENGTHS)
def test_the_emulated_kernel_equals_the_cpu_bitwise(block_length, is_noisy):
    given = ranked(case(block_length, None, 1, is_noisy=is_noisy))
    for native, emulated in zip(*(found(given, len(given.graph), where) for where in ("cpu", "simt")), strict=True):
        assert torch.equal(native, emulated)


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        (torch.zeros(13, 7, 5, dtype=torch.float64), r"requests.terms must be \[13, 7, 9\], got \[13, 7, 5\]"),
        (torch.zeros(13, 7, 9), "requests.terms must be Double, got Float"),
    ],
)
def test_bad_terms_are_refused(terms, message):
    call = arguments(case(7, 1, 0, is_noisy=False), 3)
    call[2] = [*call[2], terms]
    with pytest.raises(RuntimeError, match=message):
        propose_nodes(*call)
