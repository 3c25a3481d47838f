"""The batched denoiser with drafts against the plain decoder and the plain statement of Spiffy, on synthetic models.

A synthetic model's logits depend on every token of the block, so a draft accepted wrongly shows in all that follows.
"""

import itertools
import math
from collections import Counter
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.suite.parts import some_of
from vllm_dllm.denoiser import Denoiser
from vllm_dllm.draft.calibrated import GraphDrafter
from vllm_dllm.draft.drafter import Drafter
from vllm_dllm.draft.graph import DraftGraph, Formula
from vllm_dllm.draft.look_ahead import MAX_BLOCK_LENGTH, MIN_BUDGET, NUM_NODES
from vllm_dllm.draft.native import native_nodes, torch_nodes
from vllm_dllm.draft.readiness import Readiness
from vllm_dllm.draft.token_weights import TokenWeights
from vllm_dllm.names import PolicyName
from vllm_dllm.policy_options import POLICY_OPTIONS
from vllm_dllm.reference import block_causal, decode, policy, spiffy
from vllm_dllm.reference.decode import KvPolicy
from vllm_dllm.reference.sampling import Sampling
from vllm_dllm.state.canvas import Blocks, CanvasState
from vllm_dllm.state.draws import native_draws
from vllm_dllm.state.pins import OPEN, Pins
from vllm_dllm.state.request_params import RequestParams
from vllm_dllm.state.settle import Ledger, native_settle
from vllm_dllm.unmask.head import LogitsHead
from vllm_dllm.unmask.policy import POLICY_IDS
from vllm_dllm.unmask.schedule import UnmaskRules, count_table, reveal_times
from vllm_dllm.unmask.walk import native_walk

VOCAB, MASK, EOS = 13, 3, 1
CPU = torch.device("cpu")
ENTROPY_BOUND = 0.6
CREDIT = ("credit_alpha", "credit_beta", "credit_gamma")

LLADA, SDAR = UnmaskRules(), UnmaskRules(confidence="sampled")
DREAM = UnmaskRules("timesteps", unmasks_first_alone=True, confidence="sampled")
REFERENCE_RULES = {  # the synthetic model shifts nothing
    LLADA: policy.LLADA,
    DREAM: replace(policy.DREAM, logit_shift=False),
    SDAR: policy.SDAR,
}


class SyntheticModel:
    """Logits of each position as a random function of the block's tokens; `sharpness` makes it predictable."""

    config = SimpleNamespace(mask_token_id=MASK, eos_token_id=EOS, vocab_size=VOCAB)

    def __init__(self, block_length: int, seed: int, sharpness: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.block_length = block_length
        self.own = sharpness * torch.randn(block_length, VOCAB, generator=generator)
        self.context = torch.randn(block_length, VOCAB, block_length, VOCAB, generator=generator) / block_length**0.5

    def block_logits(self, canvas: torch.Tensor) -> torch.Tensor:
        """Map canvases [num_canvases, block_length] to [num_canvases, block_length, VOCAB]."""
        seen = self.context[torch.arange(self.block_length), canvas].sum(1)
        return self.own + seen

    def forward(self, ids: torch.Tensor, start: int, kv: object, **_: object) -> tuple[torch.Tensor, list[object]]:
        """Predict as `LLaDA.forward`; the generation begins at position 0, and blocks do not see each other."""
        blocks = ids.view(-1, self.block_length)
        return self.block_logits(blocks).flatten(0, 1), []


@dataclass(frozen=True)
class Request:
    policy: PolicyName
    threshold: float
    steps: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    alg_temp: float = 0.0
    tail: tuple[int, ...] = ()  # of the prompt, known from the start
    credit: tuple[float, float, float] = (0.7, 0.8, 0.2)
    given: tuple[int | None, ...] = ()  # of the answer behind the tail

    def params(self, rules: UnmaskRules, block_length: int, seq_len: int) -> RequestParams:
        return RequestParams(
            policy_id=POLICY_IDS[self.policy],
            threshold=self.threshold,
            factor=1.0,
            entropy_bound=ENTROPY_BOUND,
            **dict(zip(CREDIT, self.credit, strict=True)),
            alg_temp=self.alg_temp if "alg_temp" in POLICY_OPTIONS[self.policy] else 0.0,
            counts=count_table(rules, block_length, self.steps),
            times=reveal_times(block_length, self.steps),
            prompt_len=len(self.tail),
            seq_len=seq_len,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
            pins=self.pins(),
        )

    def pins(self) -> Pins | None:
        token_ids = np.array([OPEN if token is None else token for token in self.given], dtype=np.int64)
        return Pins(len(self.tail), token_ids) if self.given else None

    def reference(self, block_length: int) -> dict[str, object]:
        options = POLICY_OPTIONS[self.policy]
        return {
            "policy": policy.UnmaskPolicy(
                self.policy,
                steps=self.steps if "steps" in options else None,
                threshold=self.threshold,
                entropy_bound=ENTROPY_BOUND,
                **dict(zip(CREDIT, self.credit, strict=True)),
                alg_temp=self.alg_temp if "alg_temp" in options else None,
                confidence_dtype=torch.float64,
            ),
            "sampling": Sampling(
                temperature=self.temperature,
                seed=self.seed,
                top_k=self.top_k or None,
                top_p=self.top_p if self.top_p < 1 else None,
                forbidden_ids=(MASK,),
            ),
            "gen_length": block_length - len(self.tail),
            "block_length": block_length,
        }


def drafter_of(drafts: DraftGraph | Drafter | None, *, is_native: bool) -> Drafter | None:
    if not isinstance(drafts, DraftGraph):
        return drafts
    return GraphDrafter(drafts, choose=lambda _: native_nodes if is_native else torch_nodes)


def denoise(
    model: SyntheticModel,
    requests: list[Request],
    drafts: DraftGraph | Drafter | None,
    budget: int,
    *,
    is_native: bool = True,
    rules: UnmaskRules = LLADA,
    refreshes: bool = True,
) -> tuple[list[list[int]], list[int], list[int]]:
    """Decode one block of all requests together; returns their tokens, forwards and accepted drafts.

    The first forward has no drafts where it is a refresh.
    """
    block_length, num_reqs = model.block_length, len(requests)
    state = CanvasState(num_reqs, block_length, MASK, CPU, rules)
    for slot, r in enumerate(requests):
        state.add_request(slot, r.params(rules, block_length, block_length))
        state.canvas[slot, : len(r.tail)] = torch.tensor(r.tail, dtype=torch.int64)
    state.pins.begin(state.canvas, np.arange(num_reqs), np.zeros(num_reqs, dtype=np.int64))
    tokens = state.canvas.clone()
    state.apply_staged_writes()
    drafter = drafter_of(drafts, is_native=is_native)
    head = LogitsHead(lambda hidden: hidden.clone(), VOCAB, MASK, is_native=is_native)
    denoiser = Denoiser(state, drafter, head, *((native_walk, native_settle, native_draws) if is_native else ()))
    slots = torch.arange(num_reqs)
    forwards, accepted = torch.zeros(num_reqs, dtype=torch.int64), torch.zeros(num_reqs, dtype=torch.int64)
    num_drafts = 0 if refreshes else budget
    while len(slots):
        start = torch.zeros_like(slots)
        blocks = Blocks(slots, slots.numpy(), start)
        nodes = denoiser.nodes(blocks, num_drafts)
        forwards[slots] += nodes.is_masked[:, 0].any(1)
        hidden = model.block_logits(nodes.canvas.flatten(0, 1)).flatten(0, 1)
        decision = denoiser.advance(blocks, nodes, hidden)
        emitted = denoiser.settle(blocks, nodes, decision, Ledger(len(slots), start, start))
        assert emitted.num_sampled.tolist() == (block_length * decision.is_finished).tolist()
        accepted[slots] += decision.num_accepted
        tokens[slots] = decision.canvas
        slots = slots[~decision.is_finished]
        num_drafts = budget if drafter is not None else 0
    return tokens.tolist(), forwards.tolist(), accepted.tolist()


@st.composite
def graphs(draw: st.DrawFn, block_length: int) -> DraftGraph:
    pair = st.tuples(st.integers(0, block_length - 1), st.integers(0, 2))
    formula = st.lists(pair, min_size=1, max_size=5, unique_by=lambda p: p[0]).map(lambda pairs: tuple(sorted(pairs)))
    chain = st.integers(1, 6).map(lambda n: tuple((i, 0) for i in range(n)))
    formulas: list[Formula] = draw(st.lists(formula | chain, min_size=1, max_size=12, unique=True))
    tokens_per_step = draw(st.sampled_from([None, 1, 2]))
    if tokens_per_step:  # with all that the formulas grow from
        grown = {f[:size] for f in formulas for size in range(tokens_per_step, len(f) + 1, tokens_per_step)}
        formulas = sorted(grown) or [tuple((i, 0) for i in range(tokens_per_step))]
    formulas.sort(key=len)
    each = {"min_size": len(formulas), "max_size": len(formulas)}
    counts = draw(st.none() | st.lists(st.integers(0, 90), **each).map(tuple))
    expected = None if counts is None else tuple(draw(st.lists(st.floats(0, 90), **each)))
    weight = st.floats(-2, 2)
    readiness = draw(st.just(Readiness()) | st.builds(Readiness, weight, st.tuples(weight, weight), weight))
    quarter = st.integers(-12, 12).map(lambda n: n / 4)  # so that scores are equal exactly or not nearly
    tokens = draw(st.none() | st.builds(TokenWeights, quarter, quarter, st.tuples(*[quarter] * 4)))
    return DraftGraph(tuple(formulas), tokens_per_step, counts, 100, readiness, expected, tokens)


@st.composite
def requests_of(draw: st.DrawFn, block_length: int, rules: UnmaskRules = LLADA) -> Request:
    name = draw(st.sampled_from(get_args(PolicyName)))
    is_any, has_filter = name != "dynamic", name != "credit"
    token = st.sampled_from([t for t in range(VOCAB) if t != MASK])
    return Request(
        policy=name,
        threshold=draw(st.sampled_from([0.1, 0.3, 0.9])),
        steps=draw(st.sampled_from([n for n in range(1, block_length + 1) if is_any or block_length % n == 0])),
        temperature=draw(st.sampled_from([0.0, 0.0, 0.7, 1.0])),
        top_k=draw(st.sampled_from([0, 0, 4])) * has_filter,
        top_p=draw(st.sampled_from([1.0, 1.0, 0.8])) if has_filter else 1.0,
        seed=draw(st.integers(-(2**63), 2**63 - 1)),
        alg_temp=draw(st.sampled_from([0.0, 0.0, 0.5])),
        tail=tuple(draw(st.lists(token, max_size=block_length - 1))) if rules is SDAR else (),
        credit=draw(st.sampled_from([(0.7, 0.8, 0.2), (3.0, 1.0, 1.0), (0.5, 0.0, 0.5)])),
    )


def reference_budget(num_drafts: int, rules: UnmaskRules, block_length: int) -> int:
    """Return the budget with which the reference evaluates so many drafts of the graph.

    Of a block-causal model's it takes two for a look-ahead, even of a block that is the last, as here.
    """
    has_look_ahead = rules is SDAR and block_length <= MAX_BLOCK_LENGTH and num_drafts >= MIN_BUDGET
    return num_drafts + NUM_NODES * has_look_ahead


@settings(max_examples=some_of(150), deadline=None)
@given(
    data=st.data(),
    block_length=st.sampled_from([1, 4, 7]),
    sharpness=st.sampled_from([0.0, 3.0, 12.0]),
    is_native=st.booleans(),
    rules=st.sampled_from([LLADA, DREAM, SDAR]),
)
def test_drafts_change_forwards_and_no_token(
    data: st.DataObject, block_length: int, sharpness: float, is_native: bool, rules: UnmaskRules
) -> None:
    model = SyntheticModel(block_length, data.draw(st.integers(0, 99)), sharpness)
    requests = data.draw(st.lists(requests_of(block_length, rules), min_size=1, max_size=4))
    graph = data.draw(graphs(block_length))
    budget = data.draw(st.integers(0, len(graph)))
    plain, plain_forwards, _ = denoise(model, requests, None, 0, rules=rules)
    tokens, forwards, accepted = denoise(model, requests, graph, budget, is_native=is_native, rules=rules)
    assert tokens == plain
    for i, request in enumerate(requests):
        options = request.reference(block_length)
        prompt, generated = torch.tensor(request.tail, dtype=torch.int64), tokens[i][len(request.tail) :]
        assert tokens[i][: len(request.tail)] == list(request.tail)
        if rules is SDAR:
            reference = block_causal.generate(model, prompt, **options)  # type: ignore[arg-type]
        else:
            reference = decode.generate(model, prompt, kv=KvPolicy("dual"), rules=REFERENCE_RULES[rules], **options)  # type: ignore[arg-type]
        assert generated == reference.tokens.tolist()
        expected = spiffy.generate(
            model,
            prompt,
            graph=graph,
            budget=reference_budget(budget, rules, block_length),
            rules=REFERENCE_RULES[rules],
            **options,  # type: ignore[arg-type]
        )
        assert expected.tokens.tolist() == generated
        assert (forwards[i], accepted[i]) == (expected.nfe, expected.num_accepted)
        assert forwards[i] + accepted[i] == plain_forwards[i] == reference.nfe


def test_a_request_with_credit_alone_in_blocks_of_one_takes_drafts() -> None:
    """The op wants the ids that a policy asks for of every node's rows one behind the other."""
    model, request = SyntheticModel(1, 2, 3.0), Request("credit", 0.9, 1, 0.7, 0, 1.0, 5)
    graph = DraftGraph((((0, 0),), ((0, 1),)))
    assert denoise(model, [request], graph, 2, refreshes=False) == denoise(model, [request], None, 0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("policy", ["static", "random"])
def test_a_predictable_model_accepts_a_whole_chain(policy: PolicyName, temperature: float) -> None:
    """What depends on no other position is foreseen exactly, noise and random order included."""
    model = SyntheticModel(8, 0, 5.0)
    model.context.zero_()
    chain = DraftGraph(tuple(tuple((i, 0) for i in range(n)) for n in range(1, 8)), tokens_per_step=1)
    request = Request(policy, 0.9, 8, temperature, 0, 1.0, 5)
    tokens, forwards, accepted = denoise(model, [request], chain, 7)
    assert tokens == denoise(model, [request], None, 0)[0]
    assert (forwards, accepted) == ([2], [6])  # the refresh, and one forward for the seven steps that follow


def distribution(model: SyntheticModel, canvas: tuple[int, ...], temperature: float) -> dict[tuple[int, ...], float]:
    """Return the exact distribution of finished blocks under LLaDA's sampling, one position per step.

    Each masked position draws a token; the position whose draw is most probable (untempered) keeps it.
    """
    masked = [i for i, token in enumerate(canvas) if token == MASK]
    if not masked:
        return {canvas: 1.0}
    logits = model.block_logits(torch.tensor([canvas]))[0].double()
    logits[:, MASK] = -torch.inf
    tempered, plain = (logits / temperature).softmax(-1), logits.softmax(-1)
    total: dict[tuple[int, ...], float] = {}
    for drawn in itertools.product(range(VOCAB), repeat=len(masked)):
        chance = math.prod(float(tempered[i, token]) for i, token in zip(masked, drawn, strict=True))
        if chance == 0:
            continue
        best = max(range(len(masked)), key=lambda k: (float(plain[masked[k], drawn[k]]), -k))
        after = list(canvas)
        after[masked[best]] = drawn[best]
        total[tuple(after)] = total.get(tuple(after), 0.0) + chance
    finished: dict[tuple[int, ...], float] = {}
    for after, chance in total.items():
        for block, rest in distribution(model, after, temperature).items():
            finished[block] = finished.get(block, 0.0) + chance * rest
    return finished


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_sampled_blocks_have_the_decoders_distribution(temperature: float) -> None:
    """Chi-square of whole blocks, with drafts, against the exact distribution: nothing here draws Gumbel noise."""
    model = SyntheticModel(3, 4, 2.0)
    num_draws = 20_000
    requests = [Request("static", 0.9, 3, temperature, 0, 1.0, seed) for seed in range(num_draws)]
    graph = DraftGraph((((0, 0),), ((1, 0),), ((0, 1),)), tokens_per_step=1)
    drawn, _, accepted = denoise(model, requests, graph, 3)
    assert sum(accepted) > num_draws / 10
    expected = {block: num_draws * p for block, p in distribution(model, (MASK,) * 3, temperature).items()}
    assert sum(expected.values()) == pytest.approx(num_draws)
    counts = Counter(map(tuple, drawn))
    frequent = [block for block, count in expected.items() if count >= 5]
    rest = num_draws - sum(expected[block] for block in frequent)
    observed = [counts[block] for block in frequent] + [num_draws - sum(counts[block] for block in frequent)]
    wanted = [expected[block] for block in frequent] + [rest]
    statistic = sum((o - w) ** 2 / w for o, w in zip(observed, wanted, strict=True))
    degrees = len(wanted) - 1
    assert degrees > 20
    assert statistic < degrees + 5 * math.sqrt(2 * degrees)
