"""CreditDecoding against the published matrix over the vocabulary, and where a draft cannot be decided."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.ops.walks import MASK, random_params
from vllm_dllm import noise
from vllm_dllm.ops.vocab_stats import PartialStats, RowIds, RowSampling
from vllm_dllm.reference.credit import Credits
from vllm_dllm.unmask.credit import MAX_CREDITED
from vllm_dllm.unmask.memory import PolicyState
from vllm_dllm.unmask.policy import POLICY_IDS, PolicyParams, asked_ids, new_state
from vllm_dllm.unmask.schedule import UnmaskRules
from vllm_dllm.unmask.stats import torch_stats
from vllm_dllm.unmask.walk import Nodes, Trajectory, native_walk, walk

VOCAB, LENGTH = 40, 6
CPU = torch.device("cpu")
ALPHA, BETA, GAMMA = 3.0, 0.9, 0.2


@pytest.fixture(params=[walk, native_walk], ids=["torch", "native"])
def way(request):
    return request.param


def params_of(threshold: float, temperature: float = 0.0) -> PolicyParams:
    params = random_params(1, LENGTH, torch.Generator().manual_seed(0))
    numbers = {"credit_alpha": ALPHA, "credit_beta": BETA, "credit_gamma": GAMMA}
    numbers |= {"threshold": threshold, "temperature": temperature, "alg_temp": 0.0}
    values = {name: torch.tensor([value], dtype=torch.float64) for name, value in numbers.items()}
    return replace(params, policy_id=torch.tensor([POLICY_IDS["credit"]]), **values)


def stats_of(
    logits: Tensor, params: PolicyParams, state: PolicyState, is_masked: Tensor, *, sampled: bool
) -> PartialStats:
    """Reduce [LENGTH, VOCAB] with two candidates, asking for what has credit."""
    keys = noise.stream_keys(params.seed[:, None], params.position, is_masked.sum(-1, keepdim=True)).flatten()
    zeros, ones = torch.zeros(LENGTH, dtype=torch.int64), torch.ones(LENGTH, dtype=torch.float64)
    sampling = RowSampling(params.temperature * ones, zeros, ones, keys, has_filter=False, wants_sampled=sampled)
    asked = asked_ids(state)
    assert asked is not None
    return torch_stats(
        logits.clone(), excluded_ids=[], num_candidates=2, sampling=sampling, ids=RowIds(asked.flatten(0, 1))
    )


def decide(
    way, canvas: Tensor, logits: Tensor, params: PolicyParams, state: PolicyState, *, sampled: bool
) -> Trajectory:
    is_masked, alone = canvas == MASK, torch.ones(1, 1, dtype=torch.bool)
    stats = stats_of(logits, params, state, is_masked, sampled=sampled)
    return way(
        Nodes(canvas[None, None], is_masked[None, None], alone, alone.long()), stats, params, MASK, UnmaskRules(), state
    )


@pytest.mark.parametrize("sampled", [False, True], ids=["model", "sampled"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_steps_are_those_of_the_published_matrix(way, temperature: float, sampled: bool) -> None:
    """Six steps of as many positions, whose rows change their minds; the matrix decays as a whole."""
    params = params_of(0.95, temperature)
    changed = 0
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        canvas, state = torch.full((LENGTH,), MASK), new_state(1, LENGTH, CPU)
        matrix = torch.zeros(LENGTH, VOCAB, dtype=torch.float64)
        while (canvas == MASK).any():
            is_masked = canvas == MASK
            logits = torch.randn(LENGTH, VOCAB, generator=generator)
            logits[:, :4] += 3.0  # rivals
            best = logits.double().softmax(1).max(1)
            matrix *= BETA
            matrix[is_masked, best.indices[is_masked]] += best.values[is_masked] ** GAMMA
            fused = logits.double() + ALPHA * (matrix + 1).log()
            keys = noise.stream_keys(params.seed[:, None], params.position, is_masked.sum()[None, None])
            scores = fused + temperature * noise.gumbel(keys.T, torch.arange(VOCAB)) if temperature else fused
            tokens = scores.argmax(1)
            probs = (fused / temperature if sampled and temperature else fused).softmax(1)
            confidence = probs.gather(1, tokens[:, None])[:, 0].masked_fill(~is_masked, -1.0)
            chosen = (confidence >= 0.95) | (torch.arange(LENGTH) == confidence.argmax())
            expected = torch.where(chosen & is_masked, tokens, canvas)
            done = decide(way, canvas, logits, params, state, sampled=sampled)
            assert done.canvas[0].tolist() == expected.tolist()
            ids, credits = done.state["credit_ids"][0], done.state["credits"][0]
            assert torch.allclose(
                torch.zeros_like(matrix).scatter_add(1, ids.clamp(min=0), credits)[is_masked], matrix[is_masked]
            )
            changed += int((tokens != logits.argmax(1))[is_masked].sum())
            canvas, state = expected, done.state
    assert changed > 10


def test_a_position_credits_so_many_tokens_alone(way) -> None:
    """One more takes the place of that with the least credit, here and in the reference."""
    params, state, plain = params_of(1.0), new_state(1, LENGTH, CPU), Credits()
    canvas = torch.full((LENGTH,), MASK)
    canvas[2:] = 7
    for step in range(2 * MAX_CREDITED + 2):
        logits = torch.randn(LENGTH, VOCAB, generator=torch.Generator().manual_seed(step))
        logits[:2, (3 * step) % VOCAB] += 4.0 + 30.0 * (step == 1)
        plain.fuse(logits[:2].double(), torch.arange(2), alpha=ALPHA, beta=BETA, gamma=GAMMA)
        state = decide(way, canvas, logits, params, state, sampled=False).state
        for position in range(2):
            ids, credits = state["credit_ids"][0, position].tolist(), state["credits"][0, position].tolist()
            found = [(token, credit) for token, credit in zip(ids, credits, strict=True) if token >= 0]
            assert [token for token, _ in found] == [token for token, _ in plain.of[position]]
            assert [credit for _, credit in found] == pytest.approx(
                [credit for _, credit in plain.of[position]], rel=1e-5
            )
    assert (state["credit_ids"][0, :2] >= 0).all()
    assert (state["credit_ids"][0, 2:] == -1).all()


@pytest.mark.parametrize("is_listed", [False, True])
def test_a_draft_whose_rows_lack_a_credited_logit_is_the_next_root(way, is_listed: bool) -> None:
    """The root's step gives credit that nobody had when the head was asked; the draft's rows may list the token."""
    params, state = params_of(0.5), new_state(1, LENGTH, CPU)
    canvas = torch.full((2, LENGTH), MASK)
    canvas[1, 0] = 5
    logits = torch.zeros(2, LENGTH, VOCAB)
    logits[0, 0, 5] = 9.0  # unmasked alone
    logits[0, 1, 3] = 0.5  # gets credit
    logits[1, :, 8], logits[1, :, 9] = 1.0, 0.9
    logits[1, 1, 3] = 0.95 if is_listed else 0.1
    rows = [
        stats_of(own, params, state, masks, sampled=False) for own, masks in zip(logits, canvas == MASK, strict=True)
    ]
    for own in rows:
        own.top_ids[2:] = 0  # all other positions credit the same token all the time
    stats = PartialStats.of(lambda *columns: torch.cat(columns), *rows)
    valid = torch.ones(1, 2, dtype=torch.bool)
    nodes = Nodes(canvas[None], canvas[None] == MASK, valid, valid.long())
    done = way(nodes, stats, params, MASK, UnmaskRules(), state)
    assert done.path.tolist() == ([[0, 1]] if is_listed else [[0, -1]])
    assert done.canvas[0, 0] == 5
    credited = done.state["credit_ids"][0, 1]
    assert credited[:2].tolist() == ([3, 8] if is_listed else [3, -1])
