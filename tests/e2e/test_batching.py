"""A request's tokens depend on nothing but the request: not on neighbours, preemption, aborts or a full engine."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.rig import (
    MAX_MODEL_LEN,
    NUM_SLOTS,
    Case,
    mixed_cases,
    model_state,
    run,
    run_outputs,
    shared_engine,
    step_all,
)

SETTINGS = {"block_length": 8}
pytestmark = [pytest.mark.engine, pytest.mark.xdist_group(f"llada {SETTINGS}")]


@pytest.fixture
def llm(wild: Path) -> Any:
    return shared_engine(wild, SETTINGS)


def test_alone_equals_in_a_batch(llm: Any, oracle: Any) -> None:
    cases = mixed_cases(8, seed=3)[:6]
    together = run(llm, cases)
    assert together == [run(llm, [case])[0] for case in cases]
    assert together == [oracle.tokens(case, SETTINGS) for case in cases]


def test_order_does_not_matter(llm: Any) -> None:
    """Of more requests than there are slots, other ones wait."""
    cases = mixed_cases(8, seed=4) + mixed_cases(8, seed=5)[:7]
    assert len(cases) > NUM_SLOTS
    assert run(llm, cases[::-1])[::-1] == run(llm, cases)


def test_abort_leaves_the_others_alone(llm: Any, oracle: Any) -> None:
    cases = [Case(prompt=(7, 8, 9 + i), max_tokens=30, seed=i, temperature=0.7) for i in range(5)]

    def abort(number: int, llm: Any) -> None:
        if number == 6:
            llm.llm_engine.abort_request(["1", "3"])

    tokens = step_all(llm, cases, abort)
    assert tokens == {str(i): oracle.tokens(cases[i], SETTINGS) for i in (0, 2, 4)}


def test_a_prompt_may_contain_the_mask_token(llm: Any, oracle: Any) -> None:
    mask = oracle.model.config.mask_token_id
    case = Case(prompt=(mask, 9, mask, mask, 12, mask), max_tokens=16)
    assert run(llm, [case]) == [oracle.tokens(case, SETTINGS)]


@pytest.mark.parametrize("left", [8, 9, 15, 16, 23])
def test_generation_ends_with_the_blocks_that_fit(llm: Any, oracle: Any, left: int) -> None:
    case = Case(prompt=tuple(range(5, 5 + MAX_MODEL_LEN - left)), max_tokens=left)
    tokens = run(llm, [case])[0]
    assert len(tokens) == left // 8 * 8
    assert tokens == oracle.tokens(case, SETTINGS)


def test_n_completions_have_their_own_seeds(llm: Any, oracle: Any) -> None:
    case = Case(prompt=(5, 6, 7), max_tokens=16, temperature=1.5, seed=40)
    prompt = [{"prompt_token_ids": list(case.prompt)}]
    output = llm.generate(prompt, case.sampling_params(n=3), use_tqdm=False)[0]
    tokens = [list(completion.token_ids) for completion in output.outputs]
    assert len({tuple(t) for t in tokens}) == 3
    assert tokens[0] == oracle.tokens(case, SETTINGS)


def test_without_a_seed_each_request_draws_one(llm: Any) -> None:
    case = Case(prompt=(5, 6, 7), max_tokens=16, temperature=1.5)
    prompts = [{"prompt_token_ids": list(case.prompt)}] * 4
    outputs = llm.generate(prompts, case.sampling_params(seed=None), use_tqdm=False)
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) > 1


def test_stop_tokens_and_lengths_trim_inside_a_block(llm: Any, oracle: Any) -> None:
    case = Case(prompt=(5, 6, 7), max_tokens=24, temperature=1.0, seed=1)
    tokens = oracle.tokens(case, SETTINGS)
    stop = tokens[10]
    prompt = [{"prompt_token_ids": list(case.prompt)}]
    output = llm.generate(prompt, case.sampling_params(stop_token_ids=[stop]), use_tqdm=False)[0].outputs[0]
    assert list(output.token_ids) == tokens[: tokens.index(stop) + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)


def test_end_of_text_and_end_of_turn_stop(llm: Any, oracle: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(oracle.checkpoint)
    config = llm.llm_engine.model_config.hf_config
    assert config.eot_token_id == tokenizer.convert_tokens_to_ids("<|eot_id|>")
    processor = llm.llm_engine.input_processor
    request = processor.process_inputs(
        "stops", {"prompt_token_ids": [5, 6]}, Case((5, 6), 8).sampling_params(ignore_eos=False), ("generate",)
    )
    assert request.sampling_params.eos_token_id == tokenizer.eos_token_id
    assert request.sampling_params.stop_token_ids == [config.eot_token_id]


def test_sampled_tokens_follow_the_models_distribution(llm: Any, oracle: Any) -> None:
    """Chi-square of the first token over many seeds against the softmax the reference computes."""
    prompt = torch.tensor([5, 6, 7])
    row = torch.cat([prompt, torch.full((8,), oracle.model.config.mask_token_id)])
    temperature, num_draws = 1.3, 2000
    logits = oracle.model(row)[0][3].double()
    logits[oracle.model.config.mask_token_id] = -torch.inf
    probs = (logits / temperature).softmax(-1)
    case = Case(prompt=(5, 6, 7), max_tokens=1, policy="static", steps=1, temperature=temperature)
    params = [case.sampling_params(seed=seed) for seed in range(num_draws)]
    outputs = llm.generate([{"prompt_token_ids": list(case.prompt)}] * num_draws, params, use_tqdm=False)
    drawn = torch.tensor([output.outputs[0].token_ids[0] for output in outputs])
    counts = torch.bincount(drawn, minlength=len(probs)).double()
    expected = probs * num_draws
    frequent = expected >= 5
    observed = torch.cat([counts[frequent], counts[~frequent].sum()[None]])
    wanted = torch.cat([expected[frequent], expected[~frequent].sum()[None]])
    statistic = float(((observed - wanted) ** 2 / wanted.clamp(min=1e-9)).sum())
    degrees = len(wanted) - 1
    assert degrees >= 3, "the model is too sure of itself here for a test of its distribution"
    assert statistic < degrees + 5 * (2 * degrees) ** 0.5


def test_a_step_computes_refreshes_and_blocks_and_nothing_else(
    llm: Any, oracle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, rows = model_state(llm), []
    prepare = state.prepare_inputs

    def count(*arguments: Any) -> dict[str, Any]:
        inputs = prepare(*arguments)
        rows.append(len(inputs["input_ids"]))
        return dict(inputs)

    monkeypatch.setattr(state, "prepare_inputs", count)
    at_once = [Case(prompt=(7, 8, 9 + i), max_tokens=24, policy="threshold", threshold=0.001) for i in range(2)]
    cases = [*at_once, *mixed_cases(8, seed=12)]
    outputs = run_outputs(llm, cases)
    assert [list(output.outputs[0].token_ids) for output in outputs] == [oracle.tokens(c, SETTINGS) for c in cases]
    took = [output.kv_transfer_params["dllm"] for output in outputs]
    assert [(n["nfe"], n["nfe_refresh"]) for n in took[:2]] == [(3, 3)] * 2
    rows_of = [len(case.prompt) + 8 * -(-case.max_tokens // 8) for case in cases]
    refreshes = [n["nfe_refresh"] for n in took]
    assert sum(rows) == sum(r * n + 8 * (t["nfe"] - n) for r, n, t in zip(rows_of, refreshes, took, strict=True))
