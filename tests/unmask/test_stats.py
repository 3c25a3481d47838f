"""Row statistics by torch against a float64 statement of the same, and the reference's filter."""

import math
from dataclasses import replace

import pytest
import torch

from vllm_dllm import noise
from vllm_dllm.ops.vocab_stats import PartialStats, RowSampling
from vllm_dllm.reference.sampling import Sampling, choose_tokens
from vllm_dllm.unmask.stats import candidates_of, kept_ids, torch_stats

VOCAB = 113


def sampling(num_rows: int, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0) -> RowSampling:
    return RowSampling(
        temperature=torch.full((num_rows,), temperature, dtype=torch.float64),
        top_k=torch.full((num_rows,), top_k),
        top_p=torch.full((num_rows,), top_p, dtype=torch.float64),
        keys=noise.stream_keys(torch.tensor(7), torch.arange(num_rows), torch.tensor(3)),
        has_filter=top_k > 0 or top_p < 1,
    )


def row_stats(logits: torch.Tensor, params: RowSampling, forbidden_id: int) -> PartialStats:
    return torch_stats(logits, excluded_ids=[forbidden_id], num_candidates=3, sampling=params)


def random_logits(num_rows: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(num_rows)) * scale


@pytest.mark.parametrize("num_rows", [1, 7, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_takes_the_first_maximum_and_its_probability(num_rows: int, dtype: torch.dtype) -> None:
    logits = random_logits(num_rows).to(dtype)
    allowed = logits.double().index_fill(1, torch.tensor([5]), -torch.inf)
    params = sampling(num_rows)
    stats = row_stats(logits.clone(), params, forbidden_id=5)
    assert stats.token_ids.tolist() == allowed.argmax(1).tolist()
    expected = allowed.softmax(1).amax(1)
    assert torch.allclose(stats.distribution(params.divisor).confidence, expected, rtol=1e-6, atol=0)


def test_equal_logits_go_to_the_lowest_id() -> None:
    logits = torch.zeros(1, VOCAB)
    stats = row_stats(logits, sampling(1), forbidden_id=0)
    assert stats.token_ids.tolist() == [1]


def test_confidences_near_one_keep_their_order() -> None:
    logits = torch.zeros(3, VOCAB)
    logits[:, 1] = torch.tensor([30.0, 31.0, 29.5])
    confidence = row_stats(logits, sampling(3), forbidden_id=0).distribution(sampling(3).divisor).confidence
    assert confidence[1] > confidence[0] > confidence[2]
    assert torch.allclose(1 - confidence, 111 * torch.exp(-torch.tensor([30.0, 31.0, 29.5]).double()), rtol=1e-3)


def test_forbidden_token_is_never_chosen_even_when_sampled() -> None:
    logits = torch.full((200, VOCAB), -20.0)
    logits[:, 9] = 20.0
    stats = row_stats(logits, sampling(200, temperature=1.0), forbidden_id=9)
    assert 9 not in stats.token_ids.tolist()


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (1, 1.0), (5, 1.0), (0, 0.5), (20, 0.8), (500, 0.999)])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
def test_sampled_tokens_equal_reference(temperature: float, top_k: int, top_p: float) -> None:
    num_rows = 64
    logits = random_logits(num_rows)
    params = sampling(num_rows, temperature, top_k, top_p)
    reference = Sampling(temperature=temperature, top_k=top_k or None, top_p=top_p if top_p < 1 else None)
    expected = choose_tokens(logits.index_fill(1, torch.tensor([5]), -torch.inf), params.keys, reference)
    stats = row_stats(logits.clone(), params, forbidden_id=5)
    assert stats.token_ids.tolist() == expected.tolist()
    probs = logits.double().index_fill(1, torch.tensor([5]), -torch.inf).softmax(1)
    assert torch.allclose(
        stats.distribution(params.divisor).confidence, probs.gather(1, expected[:, None]).squeeze(1), rtol=1e-5
    )


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (1, 1.0), (5, 1.0), (0, 0.5), (20, 0.8), (3, 1e-9)])
@pytest.mark.parametrize("temperature", [0.0, 1e-9, 0.3, 1.0, 1.7, 1e9])
def test_sampled_distribution_is_the_filtered_softmax(temperature: float, top_k: int, top_p: float) -> None:
    logits = random_logits(33)
    logits[7] = 1.0  # nothing but ties
    params = replace(sampling(33, temperature, top_k, top_p), wants_sampled=True)
    stats = row_stats(logits.clone(), params, forbidden_id=5)
    allowed = logits.double().index_fill(1, torch.tensor([5]), -torch.inf)
    if temperature > 0:
        allowed = (allowed / temperature).masked_fill(~kept_ids(allowed.float(), params), -torch.inf)
    probs = allowed.softmax(1)
    first, second = probs.topk(2).values.unbind(1)
    found = stats.distribution(params.divisor)
    assert torch.allclose(found.confidence, probs.gather(1, stats.token_ids[:, None])[:, 0], rtol=1e-5, atol=0)
    assert torch.allclose(found.margin, first - second, rtol=1e-5, atol=1e-15)
    assert torch.allclose(found.entropy, torch.special.entr(probs).sum(1), rtol=1e-5, atol=1e-15)
    if temperature == 0:
        assert stats.sampled_rest is not None
        assert torch.equal(stats.sampled_rest, stats.rest)


def test_greedy_rows_among_sampled_ones_keep_the_models_distribution() -> None:
    logits = random_logits(8)
    params = replace(sampling(8, 0.5, top_k=2), wants_sampled=True)
    params.temperature[::2] = 0.0
    found = row_stats(logits.clone(), params, forbidden_id=5).distribution(params.divisor)
    greedy = row_stats(logits.clone(), sampling(8), forbidden_id=5).distribution(sampling(8).divisor)
    for name in ("confidence", "margin", "entropy"):
        assert torch.equal(getattr(found, name)[::2], getattr(greedy, name)[::2]), name
        assert (getattr(found, name)[1::2] != getattr(greedy, name)[1::2]).all(), name


def test_unwanted_the_distribution_is_the_models_own() -> None:
    logits = random_logits(8)
    params = sampling(8, 0.5, top_k=2)
    stats = row_stats(logits.clone(), params, forbidden_id=5)
    assert stats.sampled_rest is stats.sampled_weighted is None
    probs = logits.double().index_fill(1, torch.tensor([5]), -torch.inf).softmax(1)
    assert torch.allclose(stats.distribution(params.divisor).entropy, torch.special.entr(probs).sum(1), rtol=1e-5)


def test_rows_at_temperature_zero_ignore_noise_and_filter_of_others() -> None:
    logits = random_logits(8)
    params = sampling(8, 1.0, top_k=2, top_p=0.5)
    params.temperature[::2] = 0.0
    stats = row_stats(logits.clone(), params, forbidden_id=5)
    greedy = logits.index_fill(1, torch.tensor([5]), -torch.inf).argmax(1)
    assert stats.token_ids[::2].tolist() == greedy[::2].tolist()


def test_top_p_keeps_the_smallest_set_and_at_least_one() -> None:
    logits = torch.log(torch.tensor([[0.4, 0.3, 0.2, 0.1]]))
    assert kept_ids(logits, sampling(1, 1.0, top_p=0.6)).tolist() == [[True, True, False, False]]
    assert kept_ids(logits, sampling(1, 1.0, top_p=1e-9)).tolist() == [[True, False, False, False]]


def test_top_k_keeps_all_equals_of_the_last() -> None:
    logits = torch.tensor([[1.0, 0.5, 0.5, 0.0]])
    assert kept_ids(logits, sampling(1, 1.0, top_k=2)).tolist() == [[True, True, True, False]]


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_fewer_ids_than_candidates(temperature: float) -> None:
    """Also a vocabulary of which one id alone is allowed: it has no second."""
    params = replace(sampling(1, temperature, top_k=2), wants_sampled=True)
    stats = torch_stats(torch.tensor([[3.0, 1.0]]), excluded_ids=[0], num_candidates=8, sampling=params)
    assert stats.top_ids.tolist() == [[1] + 7 * [-1]]
    assert stats.top_logits.tolist() == [[1.0] + 7 * [-torch.inf]]
    found = stats.distribution(params.divisor)
    assert [found.confidence.item(), found.margin.item(), found.entropy.item()] == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("first", [2.0, -torch.inf])
def test_impossible_candidates_have_no_id_whether_id_0_is_possible_or_not(first: float) -> None:
    logits = torch.tensor([[first, 1.0, *[-torch.inf] * 5]])
    stats = torch_stats(logits, excluded_ids=[6], num_candidates=4, sampling=sampling(1))
    assert stats.top_ids.tolist() == [[0, 1, -1, -1] if first == 2.0 else [1, -1, -1, -1]]


def test_missing_candidates_have_a_valid_id_and_no_probability() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -torch.inf]])
    candidates = candidates_of(row_stats(logits, sampling(1), forbidden_id=2))
    assert candidates.token_ids.tolist() == [[1, 0, 0]]
    assert candidates.log_probs[0, :2].exp().tolist() == pytest.approx([1 / (1 + math.exp(-1)), 1 / (1 + math.e)])
    assert candidates.log_probs[0, 2] == -torch.inf
