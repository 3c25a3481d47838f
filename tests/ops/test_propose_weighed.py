"""Token weights: natively as in torch, on each device."""

import random
from dataclasses import dataclass, fields, replace

import pytest
import torch

from tests.ops import simt
from tests.ops.test_propose_nodes import (
    BLOCK_LENGTHS,
    STEPS,
    VOCAB,
    Case,
    arguments,
    case,
    check_equal,
    drafts_of,
    found,
)
from vllm_dllm.draft.propose import Drafts
from vllm_dllm.draft.token_weights import TokenWeights
from vllm_dllm.ops import propose_nodes
from vllm_dllm.unmask.schedule import UnmaskRules
from vllm_dllm.unmask.stats import Candidates


@dataclass(frozen=True)
class WeighedCase(Case):
    """A case whose graph has token weights."""

    def rounding(self) -> float:
        """Bound it whatever the probabilities are: a score is at most a hundred times the largest weight."""
        weights = self.graph.tokens
        assert weights is not None
        return 1e-11 * (10 + max(map(abs, (weights.slope, weights.slope_beside_new, *weights.same))))


def weighed(given: Case, seed: int, scale: float = 1.0) -> WeighedCase:
    """Give a graph weights that matter: half of the neighbours that are known are new, and have a candidate's token."""
    rng = random.Random(seed)
    same = tuple(scale * rng.uniform(-4, 4) for _ in range(4))
    weights = TokenWeights(scale * rng.uniform(0.5, 3), scale * rng.uniform(-1, 1), same)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    shape = given.roots.candidates.token_ids.shape
    ids = torch.rand(shape, generator=generator).argsort(-1) + 4  # of each position the same, in another order
    known = torch.randint(4, 12, given.roots.canvas.shape, generator=generator)
    canvas = torch.where(given.roots.is_masked, given.roots.canvas, known)
    is_new = ~given.roots.is_masked & (torch.rand(canvas.shape, generator=generator) < 0.5)
    rows = Candidates(ids, given.roots.candidates.log_probs)
    roots = replace(given.roots, canvas=canvas, is_new=is_new, candidates=rows)
    return WeighedCase(replace(given.graph, tokens=weights), roots, given.noise)


def without(given: Case) -> Case:
    return Case(replace(given.graph, tokens=None), given.roots, given.noise)


def check_all(given: Case, num_drafts: int | None = None) -> Drafts:
    """Compare torch, the CPU and, where the emulator runs, its kernel, the latter two bit for bit."""
    num_drafts = len(given.graph) if num_drafts is None else num_drafts
    drafts = check_equal(given, num_drafts, "cpu")
    native, *emulated = (found(given, num_drafts, where) for where in simt.PLACES)
    assert all(all(map(torch.equal, native, results)) for results in emulated)
    return drafts


@pytest.mark.parametrize("is_noisy", [False, True], ids=["greedy", "noisy"])
@pytest.mark.parametrize("tokens_per_step", STEPS)
@pytest.mark.parametrize("block_length", BLOCK_LENGTHS)
def test_equals_the_torch_twin(block_length, tokens_per_step, is_noisy):
    num_changed = 0
    for seed in range(6):
        given = weighed(case(block_length, tokens_per_step, seed, is_noisy=is_noisy), seed)
        drafts = check_all(given)
        plain = drafts_of(without(given), len(given.graph), "cpu")
        num_changed += int((drafts.canvas != plain.canvas).any())
    assert num_changed >= 4 or block_length == 1


@pytest.mark.parametrize("num_drafts", [0, 1, 3])
def test_keeps_the_best(num_drafts):
    check_all(weighed(case(33, 1, 5, is_noisy=True), 5), num_drafts)


@pytest.mark.parametrize("scale", [0.0, 25.0, -25.0])
def test_absurd_weights(scale):
    """Scores that are all equal, that leave one candidate a chance, and that turn their order around."""
    for seed in range(4):
        check_all(weighed(case(7, STEPS[seed % 3], seed, is_noisy=False), seed, scale))


@pytest.mark.parametrize("log_prob", [torch.nan, -torch.inf, -99.0])
def test_impossible_candidates(log_prob):
    """They are as unlikely as the least probable one; nothing becomes NaN, and the best of equal ones are the first."""
    given = weighed(case(33, None, 4, is_noisy=False), 4)
    given.roots.candidates.log_probs[:, ::2, 1:] = log_prob
    drafts = check_all(given)
    assert drafts.log_reach[drafts.is_valid].isfinite().all()


@pytest.mark.parametrize("log_prob", [torch.nan, -torch.inf])
def test_the_id_of_an_impossible_candidate_does_not_matter(log_prob):
    """Also where it is that of a new token beside it, which weights prefer."""
    given = weighed(case(33, None, 4, is_noisy=False), 4)
    given = replace(given, graph=replace(given.graph, tokens=TokenWeights(0.1, 0.05, (9.0, 9.0, 9.0, -9.0))))
    given.roots.candidates.log_probs[..., 1:] = log_prob
    made = []
    for token in (0, 9):
        given.roots.candidates.token_ids[..., 1:] = token
        made.append(check_all(given))
    assert torch.equal(made[0].log_reach, made[1].log_reach)
    assert (given.roots.canvas[given.roots.is_new] == 9).any()


def test_equal_candidates_are_taken_as_they_lie():
    given = weighed(case(7, 1, 2, is_noisy=False), 2)
    equal = torch.full_like(given.roots.candidates.log_probs, -2.0)
    check_all(
        replace(given, roots=replace(given.roots, candidates=Candidates(given.roots.candidates.token_ids, equal)))
    )


@pytest.mark.parametrize("num_candidates", [3, 8])
def test_fewer_candidates(num_candidates):
    for seed in range(4):
        given = weighed(case(7, STEPS[seed % 3], seed, is_noisy=False), seed)
        ids, log_probs = given.roots.candidates.token_ids, given.roots.candidates.log_probs
        rows = Candidates(ids[..., :num_candidates].contiguous(), log_probs[..., :num_candidates].contiguous())
        check_all(replace(given, roots=replace(given.roots, candidates=rows)))


@pytest.mark.parametrize("part", [1, 3, 8])
def test_what_is_masked_in_later_parts_is_not_new(part):
    for seed in range(6):
        given = replace(weighed(case(33, STEPS[seed % 3], seed, is_noisy=False), seed), sub_block_length=part)
        is_open = UnmaskRules(sub_block_length=part).open(given.roots.is_masked)
        drafts = check_equal(given, len(given.graph), "cpu", replace(given.roots, is_masked=is_open))
        for where in simt.PLACES[1:]:
            by_cuda = drafts_of(given, len(given.graph), where)
            assert all(torch.equal(getattr(by_cuda, f.name), getattr(drafts, f.name)) for f in fields(Drafts))


def test_tokens_of_other_requests_do_not_count():
    given = weighed(case(7, None, 3, is_noisy=False, num_reqs=5), 3)
    together = drafts_of(given, len(given.graph), "cpu")
    for request in range(5):
        one = slice(request, request + 1)
        roots, rows = given.roots, given.roots.candidates
        mine = replace(
            roots,
            canvas=roots.canvas[one],
            is_masked=roots.is_masked[one],
            is_new=roots.is_new[one],
            candidates=Candidates(rows.token_ids[one], rows.log_probs[one]),
        )
        alone = drafts_of(replace(given, roots=mine), len(given.graph), "cpu")
        for field in fields(Drafts):
            assert torch.equal(getattr(alone, field.name)[0], getattr(together, field.name)[request])


def test_the_end_of_a_look_ahead_goes_by_probability():
    given = weighed(case(7, 1, 1, is_noisy=False), 1, -25.0)
    plain = without(given)
    ends = [found(each, 2, where, looks_ahead=True)[-1] for each in (given, plain) for where in simt.PLACES]
    assert all(torch.equal(end, ends[0]) for end in ends)


def test_any_other_number_of_weights_is_refused():
    call = arguments(weighed(case(7, 1, 0, is_noisy=False), 0), 3)
    assert len(call[1]) == 10
    assert call[3][1].max() < VOCAB
    for count in (0, 3, 5, 9, 11):
        call[1] = [1.0] * count
        with pytest.raises(RuntimeError, match=f"weights must be 4 or 10 numbers, got {count}; give slope, near"):
            propose_nodes(*call)
