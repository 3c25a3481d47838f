"""LLaDA2 in the engine == its reference, token for token, in fp32, with drafts and without, in blocks of 32.

What its loop shares with SDAR's is tested there; here is what layers, experts in groups and published values may break.
"""

import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.llada2 import LLaDA2Oracle, make_random
from tests.e2e.rig import Case, engine, random_graph, run, run_outputs, shared_engine, short, speculation
from tests.e2e.sdar import check_preemption_and_aborts, sdar_cases
from vllm_dllm.reference.editing_rule import Editing, generate

pytestmark = [pytest.mark.engine, pytest.mark.slow("engines"), pytest.mark.xdist_group("llada2")]

BLOCK, BUDGET, MAX_MODEL_LEN = 32, 6, 256
GRAPH = random_graph(8, 12, BLOCK)
SETTINGS: dict[str, Any] = {"block_length": BLOCK}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a random model that can be foreseen a little."""
    return make_random(tmp_path_factory.mktemp("llada2") / "checkpoint", mixing=0.2)


@pytest.fixture(scope="session")
def oracle(checkpoint: Path) -> LLaDA2Oracle:
    return LLaDA2Oracle(checkpoint, MAX_MODEL_LEN)


@pytest.fixture
def llm(checkpoint: Path) -> Any:
    """An engine that is told nothing of decoding."""
    drafts = speculation(GRAPH, BUDGET)
    return shared_engine(checkpoint, {}, speculative_config=drafts, max_model_len=MAX_MODEL_LEN, block_size=BLOCK)


def tokens_of(outputs: list[Any]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.always
def test_mixed_batch_equals_reference(llm: Any, oracle: LLaDA2Oracle) -> None:
    cases = sdar_cases(BLOCK, seed=21)
    outputs = run_outputs(llm, cases)
    assert tokens_of(outputs) == [oracle.tokens(case, SETTINGS) for case in cases]
    took = [output.kv_transfer_params["dllm"] for output in outputs]
    expected = [oracle.speculative(case, SETTINGS, GRAPH, BUDGET) for case in cases]
    assert [(n["exactness"], n["nfe"], n["accepted"], n["proposed"]) for n in took] == [
        ("exact", e.nfe, e.num_accepted, e.num_proposed) for e in expected
    ]
    assert sum(e.num_accepted for e in expected) >= 16, "too few drafts come true for the test to mean much"
    assert len({token for tokens in tokens_of(outputs) for token in tokens}) > 50


def test_drafts_change_no_token(llm: Any) -> None:
    cases = sdar_cases(BLOCK, seed=22)[:8]
    with_drafts = run(llm, cases)
    without = [case.sampling_params() for case in cases]
    for params in without:
        params.extra_args["dllm_speculation"] = False
    outputs = llm.generate([{"prompt_token_ids": list(case.prompt)} for case in cases], without, use_tqdm=False)
    assert [output.kv_transfer_params["dllm"]["proposed"] for output in outputs] == [0] * len(cases)
    assert tokens_of(outputs) == with_drafts


def test_a_request_that_says_nothing_is_decoded_as_published(llm: Any, oracle: LLaDA2Oracle) -> None:
    """`dynamic` above .95, greedy, up to the published length or as far as the row goes."""
    defaults = llm.get_default_sampling_params()
    assert (defaults.temperature, defaults.max_tokens) == (0.0, 2048)
    defaults.ignore_eos = True
    prompt = tuple(range(5, 50))
    [output] = llm.generate([{"prompt_token_ids": list(prompt)}], defaults, use_tqdm=False)
    case = Case(prompt, max_tokens=MAX_MODEL_LEN - len(prompt), policy="dynamic", threshold=0.95)
    [tokens] = tokens_of([output])
    assert tokens == oracle.tokens(case, SETTINGS)
    assert len(tokens) > 150


def test_a_request_alone_is_routed_as_in_any_batch(llm: Any, oracle: LLaDA2Oracle) -> None:
    cases = sdar_cases(BLOCK, seed=23)[:4]
    expected = [oracle.tokens(case, SETTINGS) for case in cases]
    assert [run(llm, [case])[0] for case in cases] == expected
    assert run(llm, [*cases, *cases][::-1]) == [*expected, *expected][::-1]


def test_what_the_prefix_cache_has_changes_no_token(llm: Any, oracle: LLaDA2Oracle) -> None:
    prompt = tuple(5 + (7 * i) % 90 for i in range(75))
    case = Case(prompt, max_tokens=41, policy="dynamic", threshold=0.3)
    assert llm.llm_engine.reset_prefix_cache()
    outputs = [run_outputs(llm, [case])[0] for _ in range(2)]
    assert tokens_of(outputs) == [oracle.tokens(case, SETTINGS)] * 2
    assert [output.num_cached_tokens for output in outputs] == [0, 64]


def test_preemption_and_aborts_leave_the_others_alone(llm: Any, oracle: LLaDA2Oracle) -> None:
    check_preemption_and_aborts(llm, oracle, SETTINGS)


def edited_case(rng: random.Random, editing: float) -> tuple[Case, dict[str, float]]:
    """Return a request whose tokens may change, of an unsure model: a threshold of 0 replaces most of a block."""
    prompt = tuple(rng.randrange(4, 100) for _ in range(rng.choice([1, 31, 32, 45, 70])))
    case = Case(prompt, rng.choice([9, 33, 60]), threshold=0.95 if editing == 0.9 else rng.choice([0.05, 0.2, 0.7]))
    own = {"editing_threshold": editing, "editing_post_steps": rng.choice([0, 2, 16]), "editing_least": 1}
    return case, own


def test_edits_equal_reference_with_drafts_and_without(llm: Any, oracle: LLaDA2Oracle) -> None:
    """Beside requests whose tokens do not change; the prompt's end is never edited."""
    rng = random.Random(1)
    edited = [edited_case(rng, editing) for editing in (0.0, 0.0, 0.1, 0.1, 0.3, 0.9) * 2]
    others = sdar_cases(BLOCK, seed=25)[:4]
    prompts = [{"prompt_token_ids": list(case.prompt)} for case in [*(case for case, _ in edited), *others]]
    expected, num_edits = [], 0
    for case, own in edited:
        rule = partial(Editing, case.threshold, own["editing_threshold"], int(own["editing_post_steps"]), 1)
        made = generate(
            oracle.model, torch.tensor(case.prompt), gen_length=case.max_tokens, block_length=BLOCK, rule=rule
        )
        grown = partial(Editing, case.threshold, 1.0, 0, 1)
        plain = generate(
            oracle.model, torch.tensor(case.prompt), gen_length=case.max_tokens, block_length=BLOCK, rule=grown
        )
        num_edits += sum(a != b for a, b in zip(made.tokens, plain.tokens, strict=True))
        expected.append((made.tokens[: case.max_tokens], made.nfe))
    assert num_edits > 100, "too few tokens change for the test to mean much"
    accepted = 0
    for speculation_option in ({}, {"dllm_speculation": False}):
        params = [
            case.sampling_params(
                extra_args={
                    **{"dllm_policy": "editing", "dllm_threshold": case.threshold},
                    **{f"dllm_{name}": value for name, value in own.items()},
                    **speculation_option,
                }
            )
            for case, own in edited
        ]
        outputs = llm.generate(prompts, [*params, *(case.sampling_params() for case in others)], use_tqdm=False)
        took = [output.kv_transfer_params["dllm"] for output in outputs[: len(edited)]]
        found = [(tokens, n["nfe"] + n["accepted"]) for tokens, n in zip(tokens_of(outputs), took, strict=False)]
        assert found == expected
        assert tokens_of(outputs)[len(edited) :] == [oracle.tokens(case, SETTINGS) for case in others]
        accepted += sum(numbers["accepted"] for numbers in took)
    assert accepted > 0


@pytest.mark.slow("ranks")
@pytest.mark.xdist_group("both cores")
def test_two_ranks_with_half_of_the_experts_each_equal_reference(
    checkpoint: Path, oracle: LLaDA2Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group of experts each; the shared one is cut in two."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    cases, graph = short(sdar_cases(8, seed=24)), random_graph(4, 6, 8)
    ranks = {"tensor_parallel_size": 2, "enable_expert_parallel": True, "distributed_executor_backend": "mp"}
    drafts = speculation(graph, 3)
    with engine(
        checkpoint, {"block_length": 8}, speculative_config=drafts, max_model_len=MAX_MODEL_LEN, **ranks
    ) as llm:
        outputs = run_outputs(llm, cases)
    settings = {"block_length": 8}
    expected = [oracle.speculative(case, settings, graph, 3) for case in cases]
    assert tokens_of(outputs) == [oracle.tokens(case, settings) for case in cases]
    assert [o.kv_transfer_params["dllm"]["accepted"] for o in outputs] == [e.num_accepted for e in expected]
