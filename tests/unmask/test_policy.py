"""The batched policies against plain statements of the published rules, one request at a time."""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_dllm import noise
from vllm_dllm.names import PolicyName
from vllm_dllm.ops.vocab_stats import Distribution
from vllm_dllm.reference.policy import factor_count, threshold_count
from vllm_dllm.unmask.policy import POLICY_IDS, Evidence, PolicyParams, choose_positions, score_positions
from vllm_dllm.unmask.schedule import UnmaskRules, count_table, reveal_times

NO_RULES = UnmaskRules()
START = 5


def params(
    policy: PolicyName, block_length: int, *, steps: int = 1, num_known: int = 0, **changes: Any
) -> PolicyParams:
    values = {"threshold": 0.9, "factor": 1.0, "entropy_bound": 0.35, "alg_temp": 0.0}
    values |= {"credit_alpha": 0.7, "credit_beta": 0.8, "credit_gamma": 0.2} | changes
    return PolicyParams(
        policy_id=torch.tensor([POLICY_IDS[policy]]),
        seed=torch.tensor([7]),
        prompt_len=torch.tensor([START + num_known]),
        start=torch.tensor([START]),
        temperature=torch.zeros(1, dtype=torch.float64),
        counts=torch.tensor([count_table(NO_RULES, block_length, steps)]).T,
        times=torch.tensor([reveal_times(block_length, steps)], dtype=torch.float64).T,
        policies=(policy,),
        has_alg_temp=values["alg_temp"] > 0,
        **{name: torch.tensor([value], dtype=torch.float64) for name, value in values.items()},
    )


def together(*alone: PolicyParams, times: int = 1) -> PolicyParams:
    """Put requests into a batch, each of them with as many canvases."""
    names = [field.name for field in fields(PolicyParams) if isinstance(getattr(alone[0], field.name), torch.Tensor)]
    columns = {name: torch.cat([getattr(one, name) for one in alone], -1) for name in names}
    return replace(
        alone[0],
        **{name: column.repeat_interleave(times, -1) for name, column in columns.items()},
        policies=tuple({name: None for one in alone for name in one.policies}),
        has_alg_temp=any(one.has_alg_temp for one in alone),
    )


def count(policy: PolicyParams, scores: list[float], block_length: int) -> int:
    """Count for one request whose masked positions have the given scores."""
    padded = torch.zeros((1, block_length), dtype=torch.float64)
    padded[0, : len(scores)] = torch.tensor(scores, dtype=torch.float64)
    is_masked = torch.arange(block_length)[None] < len(scores)
    return int(choose_positions(padded, is_masked, policy).sum())


def evidence(num_reqs: int, block_length: int, vocab: int = 4) -> Evidence:
    """Make random evidence of masked canvases; the drawn token is any."""
    generator = torch.Generator().manual_seed(0)
    num_rows = num_reqs * block_length
    x = 4 * torch.randn(num_rows, vocab, dtype=torch.float64, generator=generator)
    x = x.sort(dim=1, descending=True).values
    x = x - x[:, :1]
    token = x.gather(1, torch.randint(0, vocab, (num_rows, 1), generator=generator)).squeeze(1)
    distribution = Distribution(x[:, 1:].exp().sum(1), (x * x.exp()).sum(1), token, x)
    return Evidence(distribution, torch.ones(num_reqs, block_length, dtype=torch.bool))


descending = st.lists(
    st.one_of(st.floats(0, 1), st.sampled_from([0.5, 2 / 3, 0.75, 0.9, 1.0])), min_size=1, max_size=12
).map(lambda values: sorted(values, reverse=True))


@settings(max_examples=300, deadline=None)
@given(confidence=descending, room=st.integers(0, 4), factor=st.sampled_from([0.1, 0.5, 1.0, 2.0]))
def test_factor_equals_reference(confidence: list[float], room: int, factor: float) -> None:
    expected = factor_count(torch.tensor(confidence, dtype=torch.float64), factor)
    block_length = len(confidence) + room
    assert count(params("factor", block_length, factor=factor), confidence, block_length) == expected


@settings(max_examples=300, deadline=None)
@given(confidence=descending, room=st.integers(0, 4), threshold=st.sampled_from([0.5, 2 / 3, 0.9, 1.0]))
def test_threshold_equals_reference(confidence: list[float], room: int, threshold: float) -> None:
    expected = threshold_count(torch.tensor(confidence, dtype=torch.float64), threshold)
    block_length = len(confidence) + room
    assert count(params("threshold", block_length, threshold=threshold), confidence, block_length) == expected


SCHEDULED: list[PolicyName] = ["static", "random", "margin", "entropy", "sequential"]


@pytest.mark.parametrize("policy", SCHEDULED)
def test_schedules_are_followed_from_the_positions_left(policy: PolicyName) -> None:
    for block_length, steps in ((8, 8), (8, 3), (32, 5), (7, 2), (1, 1)):
        left, counts = block_length, []
        while left:
            counts.append(count(params(policy, block_length, steps=steps), [0.5] * left, block_length))
            left -= counts[-1]
        assert counts == [block_length // steps + (step < block_length % steps) for step in range(steps)]


@pytest.mark.parametrize("policy", SCHEDULED)
def test_a_prompts_tail_does_not_count_as_unmasked(policy: PolicyName) -> None:
    found = [count(params(policy, 8, steps=3, num_known=3), [0.5] * left, 8) for left in (5, 2)]
    assert found == [3, 2]


@pytest.mark.parametrize(
    ("confidence", "steps", "expected"),
    [
        ([0.95, 0.92, 0.91, 0.2], 4, 3),
        ([0.95, 0.9, 0.3, 0.2], 4, 1),  # 0.9 does not exceed the threshold
        ([0.95, 0.9, 0.3, 0.2], 2, 2),
        ([0.2], 2, 1),
        ([0.5, 0.4, 0.3, 0.2], 1, 4),
    ],
)
def test_dynamic_takes_what_exceeds_the_threshold_or_its_share(
    confidence: list[float], steps: int, expected: int
) -> None:
    assert count(params("dynamic", 4, steps=steps), confidence, 4) == expected


@pytest.mark.parametrize(
    ("entropies", "bound", "expected"),
    [
        ([0.1, 0.1, 0.2, 0.3], 0.35, 2),
        ([0.125, 0.125, 0.125, 0.3], 0.375, 2),  # the sum has to stay below the bound
        ([0.5, 0.6], 0.35, 1),
        ([0.0, 0.0, 0.0], 0.35, 3),
    ],
)
def test_entropy_bounded_takes_the_lowest_while_their_sum_is_below(
    entropies: list[float], bound: float, expected: int
) -> None:
    policy = params("entropy_bounded", 4, entropy_bound=bound)
    assert count(policy, [-entropy for entropy in entropies], 4) == expected


@pytest.mark.parametrize("steps", [1, 3, 9])
def test_origin_reveals_as_the_published_draws_do(steps: int) -> None:
    """A position masked at time t is revealed by the step from t to s if its number is not below s."""
    size = 9
    policy = params("origin", size, steps=steps)
    shown = evidence(1, size)
    uniform = noise.uniform(noise.stream_keys(torch.tensor(7), policy.position, torch.tensor(0)), noise.STREAM)[0]
    is_masked = torch.ones(1, size, dtype=torch.bool)
    times = torch.linspace(1, 1e-3, steps + 1).double()
    for step in range(steps):
        is_revealed = uniform >= times[step + 1] if step < steps - 1 else torch.ones(size, dtype=torch.bool)
        is_revealed &= is_masked[0]
        if is_revealed.any():
            chosen = choose_positions(score_positions(shown, policy), is_masked, policy)
            assert chosen[0].tolist() == is_revealed.tolist()
            is_masked &= ~chosen
    assert not is_masked.any()


def step_keys(size: int) -> torch.Tensor:
    """Return the noise streams of a step on a masked canvas."""
    return noise.stream_keys(torch.tensor(7), START + torch.arange(size)[None], torch.tensor(size))


def plain_scores(policy: PolicyName, shown: Evidence) -> torch.Tensor:
    shape = shown.is_masked.shape
    probs = (shown.distribution.candidates.exp() / (1 + shown.distribution.rest[:, None])).view(*shape, -1)
    scores = {
        "static": shown.distribution.token.exp().view(shape) / (1 + shown.distribution.rest.view(shape)),
        "margin": probs[..., 0] - probs[..., 1],
        "entropy": (probs * probs.log()).sum(-1),
        "random": noise.uniform(step_keys(shape[1]), noise.STREAM),
        "sequential": -torch.arange(shape[1])[None].double(),
    }
    return scores[policy]


@pytest.mark.parametrize("policy", SCHEDULED)
def test_each_policy_has_its_own_order(policy: PolicyName) -> None:
    shown = evidence(1, 33)
    found = score_positions(shown, params(policy, 33))
    order = [
        scores.sort(descending=True, stable=True).indices.tolist() for scores in (found, plain_scores(policy, shown))
    ]
    assert order[0] == order[1]


@pytest.mark.parametrize("policy", ["static", "margin", "entropy"])
def test_alg_temp_draws_positions_by_their_scores(policy: PolicyName) -> None:
    """Scores over the temperature are log probabilities; noise of the step makes a draw of them."""
    shown = evidence(1, 7)
    drawn = score_positions(shown, params(policy, 7, alg_temp=0.25))
    expected = score_positions(shown, params(policy, 7)) / 0.25 + noise.gumbel(step_keys(7), noise.STREAM)
    assert drawn.tolist() == expected.tolist()


@pytest.mark.parametrize("policy", ["static", "margin", "entropy"])
def test_a_temperature_so_low_that_scores_overflow_still_unmasks(policy: PolicyName) -> None:
    one = params(policy, 7, steps=7, alg_temp=5e-324)
    is_masked = torch.tensor([[False, False, True, True, False, True, False]])
    chosen = choose_positions(score_positions(evidence(1, 7), one), is_masked, one)
    assert chosen.tolist() == [[position == 2 for position in range(7)]]


def test_positions_are_drawn_with_the_published_probabilities() -> None:
    num_draws = 20_000
    scores = torch.tensor([0.1, 0.4, 0.7], dtype=torch.float64)
    x = torch.full((3 * num_draws, 2), -torch.inf, dtype=torch.float64)
    x[:, 0] = 0.0
    token = scores.log().repeat(num_draws)  # confidence is exp(token) alone
    distribution = Distribution(torch.zeros_like(token), torch.zeros_like(token), token, x)
    is_masked = torch.ones(num_draws, 3, dtype=torch.bool)
    policy = together(params("static", 3, steps=3, alg_temp=0.5), times=num_draws)
    policy = replace(policy, seed=torch.arange(num_draws))
    chosen = choose_positions(score_positions(Evidence(distribution, is_masked), policy), is_masked, policy)
    expected = num_draws * torch.softmax(scores / 0.5, 0)
    statistic = float(((chosen.sum(0) - expected) ** 2 / expected).sum())
    assert chosen.sum() == num_draws
    assert statistic < 13.8  # chi-square of two degrees of freedom, at 0.001


def test_equal_scores_go_to_the_lowest_position() -> None:
    confidence = torch.tensor([[0.5, 0.9, 0.5, 0.9, 0.9]], dtype=torch.float64)
    is_masked = torch.tensor([[True, False, True, True, True]])
    chosen = choose_positions(confidence, is_masked, params("static", 5, steps=2))
    assert chosen.tolist() == [[True, False, False, True, True]]


@pytest.mark.parametrize("policy", list(POLICY_IDS))
def test_a_step_unmasks_masked_positions_alone_and_at_least_one(policy: PolicyName) -> None:
    shown = evidence(1, 5)
    scores = score_positions(shown, params(policy, 5))
    for num_masked in range(6):
        is_masked = torch.arange(5)[None] >= 5 - num_masked
        chosen = choose_positions(scores, is_masked, params(policy, 5, threshold=1.0, entropy_bound=1e-9))
        assert not (chosen & ~is_masked).any()
        assert chosen.any() == (num_masked > 0)


@pytest.mark.parametrize("num_nodes", [1, 3])
def test_policies_do_not_see_their_neighbours(num_nodes: int) -> None:
    size = 7
    alone = [params(name, size, steps=2, threshold=0.6, factor=1.5, entropy_bound=1.0) for name in POLICY_IDS]
    alone += [params(name, size, steps=3, alg_temp=0.5) for name in ("static", "margin", "entropy")]  # type: ignore[arg-type]
    shown = evidence(len(alone) * num_nodes, size)
    mixed = together(*alone, times=num_nodes)
    is_masked = torch.rand(shown.is_masked.shape, generator=torch.Generator().manual_seed(1)) < 0.6
    is_masked[:, 0] = True
    shown = replace(shown, is_masked=is_masked)
    found = choose_positions(score_positions(shown, mixed), is_masked, mixed)
    for row in range(len(is_masked)):
        own = alone[row // num_nodes]
        rows = slice(row * size, (row + 1) * size)
        columns = (getattr(shown.distribution, name)[rows] for name in ("rest", "weighted", "token", "candidates"))
        its = Evidence(Distribution(*columns), is_masked[row : row + 1])
        expected = choose_positions(score_positions(its, own), is_masked[row : row + 1], own)
        assert found[row].tolist() == expected[0].tolist(), own.policies
