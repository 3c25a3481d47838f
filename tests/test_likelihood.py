"""Monte-Carlo likelihoods: the masks of the samples, and estimates beside the reference and an exhaustive sum."""

import math
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.draft.test_exact import CPU, MASK, VOCAB, Request, SyntheticModel
from tests.draft.test_exact import LLADA as LLADA_RULES
from tests.unmask.edited import denoiser_of
from vllm_dllm.blocks import row_blocks
from vllm_dllm.config import DllmConfig
from vllm_dllm.likelihood import Estimate, Mean, Part, draw_masks, parts
from vllm_dllm.reference.loglikelihood import exhaustive, loglikelihood, losses, masks
from vllm_dllm.reference.policy import LLADA, Rules
from vllm_dllm.state.canvas import Blocks, CanvasState
from vllm_dllm.state.pins import OPEN
from vllm_dllm.state.settle import Ledger

LENGTH = 6
SHIFTED = Rules(logit_shift=True)


class Whole(SyntheticModel):
    """A model of sequences of one length, whose positions all see each other."""

    def forward(self, ids: torch.Tensor, start: int, kv: object) -> tuple[torch.Tensor, list[object]]:
        return self.block_logits(ids[None])[0], []


PROMPT = torch.tensor([7, 5])
CONTINUATION = torch.tensor([4, 4, 9, 2])
MODEL = Whole(LENGTH, 3, 2.0)


@pytest.mark.parametrize(("num_samples", "length"), [(1, 1), (1, 9), (7, 1), (5, 3), (32, 7), (16, 40)])
def test_masks_are_the_references_and_spread_evenly(num_samples: int, length: int) -> None:
    is_masked = draw_masks(num_samples, length, seed=-5)
    assert [np.flatnonzero(row).tolist() for row in is_masked] == masks(num_samples, length, seed=-5)
    counts = np.bincount(is_masked.sum(1), minlength=length + 1)
    assert counts[0] == 0
    assert counts[1:].max() - counts[1:].min() <= 1


def test_masks_depend_on_the_seed_and_no_position_is_preferred() -> None:
    drawn = [draw_masks(64, 5, seed) for seed in range(40)]
    assert len({each.tobytes() for each in drawn}) == 40
    share = np.mean(drawn, axis=(0, 1))
    assert share == pytest.approx([0.6] * 5, abs=0.05)  # of 2,560 samples, 5 standard deviations


def estimate(log_probs: np.ndarray, is_masked: np.ndarray, order: Iterable[int]) -> Estimate:
    """Put samples [num_samples, length] together, as they become known."""
    mean = Mean(*is_masked.shape)
    for sample in order:
        mean.add(sample, log_probs[sample], is_masked[sample])
    return mean.estimate()


@pytest.mark.parametrize("rules", [LLADA, SHIFTED], ids=["llada", "dream"])
def test_an_estimate_is_the_references(rules: Rules) -> None:
    expected = loglikelihood(MODEL, PROMPT, CONTINUATION, num_samples=20, seed=4, rules=rules)
    is_masked = draw_masks(20, len(CONTINUATION), 4)
    log_probs = np.full(is_masked.shape, np.nan)
    for row, masked in zip(log_probs, is_masked, strict=True):
        row[masked] = losses(MODEL, PROMPT, CONTINUATION, np.flatnonzero(masked).tolist(), rules).numpy()
    orders = range(20), np.random.default_rng(0).permutation(20).tolist()
    found, other = (estimate(log_probs, is_masked, order) for order in orders)
    assert found == other
    assert found.value == pytest.approx(expected.value)
    assert found.tokens == pytest.approx(expected.tokens)
    assert sum(found.tokens) == pytest.approx(found.value)
    assert found.standard_error == pytest.approx(np.std(expected.samples, ddof=1) / math.sqrt(20))


def test_an_estimate_is_within_its_error_of_the_whole_sum() -> None:
    whole = exhaustive(MODEL, PROMPT, CONTINUATION)
    found = [loglikelihood(MODEL, PROMPT, CONTINUATION, num_samples=64, seed=seed) for seed in range(20)]
    values = np.array([each.value for each in found])
    errors = np.array([np.std(each.samples, ddof=1) / 8 for each in found])
    assert (abs(values - whole) < 4 * errors).all()
    assert abs(values.mean() - whole) < 4 * errors.mean() / math.sqrt(20)
    assert values.std() < 1.5 * errors.mean()


def test_a_token_alone_is_its_cross_entropy() -> None:
    """All samples mask it; and every id counts, the mask token too, as published."""
    one = Whole(3, 1, 1.0)
    logits = one.forward(torch.tensor([7, 5, MASK]), 0, None)[0][2]
    assert len(logits) == VOCAB
    expected = float(logits.double().log_softmax(-1)[9])
    found = loglikelihood(one, PROMPT, torch.tensor([9]), num_samples=3)
    assert found.value == pytest.approx(expected)
    assert found.samples == pytest.approx([expected] * 3)
    assert exhaustive(one, PROMPT, torch.tensor([9])) == pytest.approx(expected)


def test_a_sample_is_asked_by_blocks_that_it_masks() -> None:
    """Each with the whole sequence around it; the sequence ends with the continuation."""
    continuation, masked = (
        [10, 11, 12, 13, 14, 15, 16],
        np.array([[0, 1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 1]], dtype=bool),
    )
    asked = list(parts([5, 6], continuation, masked, 3, MASK))
    assert asked == [
        Part(0, 0, [5, 6], [10, OPEN, 12, 13, 14, 15, 16], [10, 11, 12]),
        Part(1, 0, [5, 6], [OPEN, OPEN, 12, 13, 14, 15, OPEN], [10, 11, 12]),
        Part(1, 6, [5, 6, MASK, MASK, 12, 13, 14, 15], [OPEN], [16]),
    ]
    log_probs = np.zeros((2, 7))
    for part in asked:
        part.put(log_probs[part.sample], [-float(token) for token in part.targets])
    assert log_probs.tolist() == [[-10, -11, -12, 0, 0, 0, 0], [-10, -11, -12, 0, 0, 0, -16]]
    settings = DllmConfig(block_length=3)
    for part in asked:
        blocks = row_blocks(len(part.prompt), len(part.behind), settings, 20, is_exact=True)
        assert (blocks.begin, blocks.end) == (len(part.prompt), 9)


def test_a_block_is_scored_in_one_step_beside_others_that_are_decoded() -> None:
    """By the log-probabilities of its targets where it is masked, whatever the policy would take."""
    targets, is_masked = [7, 5, *CONTINUATION.tolist()], draw_masks(6, len(CONTINUATION), 1)
    free = Request("static", 0.9, LENGTH, 0.0, 0, 1.0, 0)
    state = CanvasState(len(is_masked) + 1, LENGTH, MASK, CPU)
    for slot, masked in enumerate(is_masked):
        params = replace(free.params(LLADA_RULES, LENGTH, LENGTH), num_logprobs=0, targets=tuple(targets), pins=None)
        state.add_request(slot, params)
        state.canvas[slot] = torch.tensor(targets).masked_fill(torch.tensor([False, False, *masked]), MASK)
    state.add_request(len(is_masked), replace(free.params(LLADA_RULES, LENGTH, LENGTH), pins=None))
    state.apply_staged_writes()
    denoiser = denoiser_of(state, None, is_native=True)
    slots, none = torch.arange(len(is_masked) + 1), torch.zeros(len(is_masked) + 1, dtype=torch.int64)
    blocks = Blocks(slots, slots.numpy(), none)
    nodes = denoiser.nodes(blocks, 0)
    done = denoiser.advance(blocks, nodes, MODEL.block_logits(nodes.canvas[:, 0]).flatten(0, 1))
    emission = denoiser.settle(blocks, nodes, done, Ledger(len(slots), none, none))
    assert emission.num_sampled.tolist() == [LENGTH] * len(is_masked) + [0]
    assert emission.sampled[:-1].tolist() == [targets] * len(is_masked)
    assert done.num_unmasked.tolist() == [*is_masked.sum(1), 1]
    assert emission.logprobs is not None
    found = emission.logprobs.tokens.log_probs[:, 2:, 0]
    for row, masked in zip(found, is_masked, strict=True):
        expected = losses(MODEL, PROMPT, CONTINUATION, np.flatnonzero(masked).tolist())
        assert row[masked].tolist() == pytest.approx(expected.tolist(), abs=1e-5)
        assert row[~masked].tolist() == [0.0] * int((~masked).sum())
    state.add_request(0, free.params(LLADA_RULES, LENGTH, LENGTH))  # the slot's next request is decoded
    assert not state.targets.is_scored(slots.numpy())[0]
