"""Speculation changes forwards and no token: engine with drafts == engine without == reference, in fp32."""

import dataclasses
import statistics
from pathlib import Path
from typing import Any

import pytest

from benchmarks.launches import BEFORE, BEHIND, counted
from tests.draft.nonsense import NonsenseDrafter
from tests.e2e.ended import check_ended, ending
from tests.e2e.growing import growing
from tests.e2e.interference import check_interference
from tests.e2e.logprobs import check_logprobs, run_asking
from tests.e2e.rig import (
    CHECKPOINT,
    Case,
    Oracle,
    check_counts_while_running,
    engine,
    mixed_cases,
    questions,
    random_graph,
    run_outputs,
    shared_engine,
    speculation,
)
from tests.e2e.triton_arguments import check_arguments
from tests.suite.order import configurations
from vllm_dllm.draft.token_weights import TokenWeights

pytestmark = [pytest.mark.engine, pytest.mark.slow("engines")]


def hot(cases: list[Case]) -> list[Case]:
    """Raise the temperature of every other sampled case to 1."""
    return [
        dataclasses.replace(case, temperature=1.0) if case.temperature and i % 2 else case
        for i, case in enumerate(cases)
    ]


WEIGHTS = TokenWeights(-1.0, -0.5, (-3.0, 1.0, -0.5, 0.5))
ALWAYS = [(8, 12, 5, None, "csrc", None)]
USUAL = [(32, 24, 3, 1, "torch", WEIGHTS), (8, 12, "auto", 2, "csrc", None)]
SLOW = [
    (8, 12, 12, 1, "csrc", None),
    (32, 10, 10, None, "csrc", WEIGHTS),
    (32, 24, 3, 1, "csrc", None),
    (8, 12, 5, None, "torch", None),
]
"""Block length, nodes, budget, tokens per step, attention, token weights."""
MAX_MODEL_LEN = 1024
"""Rows behind it are cut, and with them drafts: it leaves room for most of the rows of these cases."""
MAX_ROWS = 8192
"""Room for the whole budget of all requests at once, more than the server takes by itself (`MAX_DRAFT_ROWS`)."""


@pytest.fixture(params=configurations("spiffy", ALWAYS, USUAL, SLOW))
def served(request: pytest.FixtureRequest, mild: Path) -> Any:
    block_length, num_nodes, budget, tokens_per_step, attention, weights = request.param
    graph = random_graph(num_nodes, num_nodes, block_length, tokens_per_step)
    graph = dataclasses.replace(graph, tokens=weights)
    settings = {"block_length": block_length, "attention": attention}
    config = speculation(graph, budget)
    options = {"max_model_len": MAX_MODEL_LEN, "max_num_batched_tokens": MAX_ROWS}
    return shared_engine(mild, settings, speculative_config=config, **options), settings, graph, budget


@pytest.mark.always
def test_mixed_batch_equals_reference(served: Any, mild_oracle: Oracle) -> None:
    llm, settings, graph, budget = served
    cases = hot(mixed_cases(settings["block_length"], seed=settings["block_length"]))
    outputs = run_asking(llm, cases)
    assert [list(output.outputs[0].token_ids) for output in outputs] == [
        mild_oracle.tokens(case, settings) for case in cases
    ]
    check_logprobs(outputs, [mild_oracle.generation(case, settings).log_probs for case in cases])
    took = [output.kv_transfer_params["dllm"] for output in outputs]
    assert {numbers["exactness"] for numbers in took} == {"exact"}
    if budget == "auto":
        return
    expected = [mild_oracle.speculative(case, settings, graph, budget) for case in cases]
    assert [(n["nfe"], n["nfe_refresh"], n["accepted"], n["proposed"]) for n in took] == [
        (e.nfe, e.nfe_refresh, e.num_accepted, e.num_proposed) for e in expected
    ]
    assert sum(e.num_accepted for e in expected) >= 8, "too few drafts come true for the test to mean much"
    if graph.tokens is not None:
        plain = dataclasses.replace(graph, tokens=None)
        without = [mild_oracle.speculative(case, settings, plain, budget) for case in cases]
        assert [e.num_accepted for e in expected] != [e.num_accepted for e in without], "the weights decide nothing"


@pytest.mark.always
def test_nonsense_changes_no_token(served: Any, mild_oracle: Oracle) -> None:
    """Random, equal and finished canvases, all said to be valid, in the place of the drafter's."""
    llm, settings, _, _ = served
    denoiser = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model_state.denoiser
    vocab_size = llm.llm_engine.model_config.get_vocab_size()
    own, nonsense = denoiser.drafter, NonsenseDrafter(vocab_size)
    nonsense.attach(denoiser.state)
    cases = mixed_cases(settings["block_length"], seed=11)
    denoiser.drafter = nonsense
    try:
        outputs = run_outputs(llm, cases)
    finally:
        denoiser.drafter = own
    assert [list(o.outputs[0].token_ids) for o in outputs] == [mild_oracle.tokens(case, settings) for case in cases]


@pytest.mark.always
def test_an_answer_ends_before_its_block(served: Any, mild_oracle: Oracle) -> None:
    llm, settings, graph, budget = served
    cases = mixed_cases(settings["block_length"], seed=21)
    check_ended(llm, mild_oracle, cases, settings)
    if budget == "auto":
        return
    cases = ending(mild_oracle, cases, settings, seed=3)
    took = [output.kv_transfer_params["dllm"] for output in run_outputs(llm, cases)]
    expected = [mild_oracle.speculative(case, settings, graph, budget) for case in cases]
    assert [(n["nfe"], n["accepted"], n["proposed"]) for n in took] == [
        (e.nfe, e.num_accepted, e.num_proposed) for e in expected
    ]


@pytest.mark.always
def test_a_sequence_may_grow(served: Any, mild_oracle: Oracle) -> None:
    llm, settings, graph, budget = served
    cases = growing(mixed_cases(settings["block_length"], seed=22))
    outputs = run_outputs(llm, cases)
    tokens = [mild_oracle.tokens(case, settings) for case in cases]
    assert [list(output.outputs[0].token_ids) for output in outputs] == tokens
    if budget == "auto":
        return
    took = [output.kv_transfer_params["dllm"] for output in outputs]
    expected = [mild_oracle.speculative(case, settings, graph, budget) for case in cases]
    assert [(n["nfe"], n["nfe_refresh"], n["accepted"]) for n in took] == [
        (e.nfe, e.nfe_refresh, e.num_accepted) for e in expected
    ]


@pytest.mark.always
def test_preemption_and_aborts_leave_the_others_alone(served: Any, mild_oracle: Oracle) -> None:
    llm, settings, _, _ = served
    cases, every = hot(mixed_cases(settings["block_length"], seed=6)[:8]), settings["block_length"] + 5
    check_interference(llm, cases, lambda case: mild_oracle.tokens(case, settings), lambda number: number % every == 5)


@pytest.mark.always
def test_step_times_are_measured_where_budgets_follow_from_them(served: Any) -> None:
    llm, settings, _, budget = served
    curve = llm.llm_engine.engine_core.engine_core.scheduler.rule.curve
    assert (curve is not None) == (budget == "auto")
    if curve is not None:
        assert curve.points[0][0] == settings["block_length"]
        assert len(curve.points) > 1


@pytest.mark.always
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_step_asks_torch_for_few_things(served: Any, temperature: float) -> None:
    """On a GPU each is a launch, and before the forward the device waits for them."""
    llm, settings, _, _ = served
    block_length = settings["block_length"]
    case = Case(prompt=tuple(range(5, 25)), max_tokens=3 * block_length, temperature=temperature)
    with counted(llm) as steps:
        run_outputs(llm, [case])
    before, behind = (statistics.median(ops.total() for ops in steps[part]) for part in (BEFORE, BEHIND))
    assert len(steps[BEHIND]) >= 3
    assert settings["attention"] != "csrc" or before <= 4, steps[BEFORE]  # torch's plan gathers pages
    assert behind <= 5 + (temperature > 0), steps[BEHIND]


@pytest.mark.always
def test_counts_of_runner_and_scheduler_agree(served: Any) -> None:
    llm, settings, _, _ = served
    check_counts_while_running(llm, mixed_cases(settings["block_length"], seed=5))


@pytest.mark.always
def test_vllms_kernels_get_what_they_rely_on(served: Any) -> None:
    llm, settings, _, _ = served
    check_arguments(lambda: run_outputs(llm, mixed_cases(settings["block_length"], seed=5)[:5]))


def test_near_the_end_of_max_model_len_drafts_are_left_out(mild: Path, mild_oracle: Oracle) -> None:
    """Rows behind max_model_len would have no pages."""
    settings = {"block_length": 8}
    graph = random_graph(1, 6, 8)
    with engine(mild, settings, speculative_config=speculation(graph, 6)) as llm:
        cases = [Case(prompt=tuple(range(5, 5 + 128 - left)), max_tokens=left) for left in (8, 15, 64, 128 - 20)]
        outputs = run_outputs(llm, cases)
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    assert tokens == [mild_oracle.tokens(case, settings) for case in cases]
    assert outputs[3].kv_transfer_params["dllm"]["proposed"] > 0


def test_answers_of_the_trained_model_take_fewer_forwards(trained: Oracle) -> None:
    cases = [Case(prompt=prompt, max_tokens=40) for prompt in questions(16)]
    settings = {"block_length": 32}
    with engine(CHECKPOINT, settings, speculative_config={"method": "spiffy", "budget": 5}, max_model_len=256) as llm:
        outputs = run_outputs(llm, cases, ignore_eos=False)
    expected = [trained.generation(dataclasses.replace(case, stop_ids=trained.end_ids), settings) for case in cases]
    for output, generation in zip(outputs, expected, strict=True):
        tokens = list(output.outputs[0].token_ids)
        assert tokens == generation.tokens.tolist()[: len(tokens)]
    nfe = sum(output.kv_transfer_params["dllm"]["nfe"] for output in outputs)
    assert nfe < 0.8 * sum(generation.nfe for generation in expected)


@pytest.mark.slow("answers")
@pytest.mark.parametrize("policy", ["static", "threshold"])
def test_two_hundred_answers_of_the_trained_model(policy: str, trained: Oracle) -> None:
    cases = [Case(prompt=prompt, max_tokens=40, policy=policy) for prompt in questions(200)]
    settings = {"block_length": 32}
    options = {"max_model_len": 256}
    with engine(CHECKPOINT, settings, **options) as llm:
        plain = run_outputs(llm, cases, ignore_eos=False)
    config = {"method": "spiffy", "budget": 5}
    with engine(CHECKPOINT, settings | {"policy": policy}, speculative_config=config, **options) as llm:
        drafted = run_outputs(llm, cases, ignore_eos=False)
    assert [o.outputs[0].token_ids for o in drafted] == [o.outputs[0].token_ids for o in plain]
    assert [o.outputs[0].finish_reason for o in drafted] == [o.outputs[0].finish_reason for o in plain]
    plain_nfe, nfe = (sum(o.kv_transfer_params["dllm"]["nfe"] for o in outputs) for outputs in (plain, drafted))
    # At the threshold most answers are known at once, and a refresh is all they take.
    assert nfe < 0.8 * plain_nfe if policy == "static" else nfe <= plain_nfe
    for case, output in list(zip(cases, drafted, strict=True))[:12]:
        tokens = list(output.outputs[0].token_ids)
        assert tokens == trained.tokens(case, settings)[: len(tokens)]


@pytest.mark.parametrize(
    "settings",
    [
        {"kv_policy": "prefix"},
        pytest.param({"refresh_every": 3}, marks=pytest.mark.slow("configurations")),
    ],
    ids=str,
)
def test_near_drafts_answer_and_say_so(settings: dict[str, Any], mild: Path, mild_oracle: Oracle) -> None:
    graph = random_graph(3, 8, 8)
    cases = mixed_cases(8, seed=2)[:8]
    settings = settings | {"block_length": 8}
    config = speculation(graph, 4, exactness="near")
    with engine(mild, settings, speculative_config=config, max_model_len=256) as llm:
        outputs = run_outputs(llm, cases)
    took = [output.kv_transfer_params["dllm"] for output in outputs]
    assert {numbers["exactness"] for numbers in took} == {"near"}
    assert sum(numbers["accepted"] for numbers in took) > 0
    assert [len(output.outputs[0].token_ids) for output in outputs] == [case.max_tokens for case in cases]
    exact = [i for i, numbers in enumerate(took) if numbers["accepted"] == 0]
    assert exact, "all had drafts accepted, and there is nothing to compare"
    for i in exact:
        assert list(outputs[i].outputs[0].token_ids) == mild_oracle.tokens(cases[i], settings)
