"""vLLM's LoRA: requests of two adapters and of none in one batch get the tokens of merged weights, in fp32.

The rows of a request differ from step to step and from those of its neighbours: refreshes, prefills, commits, drafts.
An engine has room for two adapters, and both are in use.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.adapters import add_module, make_adapter, merge_adapter
from tests.e2e.dream import dream_oracle
from tests.e2e.rig import CHECKPOINT, Case, Oracle, engine, mixed_cases, random_graph, speculation
from tests.e2e.sdar import SdarOracle, sdar_cases

pytestmark = [pytest.mark.engine, pytest.mark.slow("engines")]

MODULES = {
    "llada": ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out"),
    **dict.fromkeys(("dream", "sdar"), ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")),
}
"""Of a layer, by their published names; the second adapter has some of them alone."""
MAX_MODEL_LEN = 256
OPTIONS = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8, "max_model_len": MAX_MODEL_LEN}
ORACLES: dict[str, Callable[[Path], Oracle]] = {
    "llada": lambda path: Oracle(path, max_model_len=MAX_MODEL_LEN),
    "dream": dream_oracle,
    "sdar": lambda path: SdarOracle(path, MAX_MODEL_LEN),
}


@pytest.fixture(scope="module")
def adapted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a family, its checkpoint, two adapters and the reference decoders of the base and of both."""
    family = request.param
    checkpoint = request.getfixturevalue({"llada": "mild", "dream": "mild_dream", "sdar": "mild_sdar"}[family])
    folder, modules = tmp_path_factory.mktemp(family), MODULES[family]
    adapters, merged = [folder / "first", folder / "second"], [folder / "merged first", folder / "merged second"]
    make_adapter(adapters[0], checkpoint, modules, alpha=8, seed=1)
    make_adapter(adapters[1], checkpoint, (modules[1], modules[-1]), alpha=12, seed=2)
    for adapter, path in zip(adapters, merged, strict=True):
        merge_adapter(path, checkpoint, adapter)
    return family, checkpoint, adapters, [ORACLES[family](path) for path in (checkpoint, *merged)]


def cases_of(family: str, num_models: int) -> list[Case]:
    """Return requests for each model in turn; those at the end differ in nothing but the model."""
    cases = sdar_cases(4, seed=3) if family == "sdar" else mixed_cases(8, seed=3)
    cases = [replace(case, steps=None, max_tokens=max(case.max_tokens, 20)) for case in cases[:9]]
    return [*cases, *[Case(tuple(range(20, 53)), max_tokens=30)] * num_models]


def generate(llm: Any, cases: list[Case], adapters: list[Any]) -> list[Any]:
    prompts = [{"prompt_token_ids": list(case.prompt)} for case in cases]
    return llm.generate(prompts, [case.sampling_params() for case in cases], lora_request=adapters, use_tqdm=False)


SLOW = [pytest.param(family, 0, marks=pytest.mark.slow("configurations")) for family in ("llada", "sdar")]


@pytest.mark.parametrize(
    ("adapted", "budget"),
    [SLOW[0], ("llada", 4), ("dream", "auto"), SLOW[1], ("sdar", 4)],
    indirect=["adapted"],
)
def test_adapters_equal_merged_weights(adapted: Any, budget: int | str) -> None:
    from vllm.lora.request import LoRARequest

    family, checkpoint, adapters, oracles = adapted
    block_length = 4 if family == "sdar" else 8
    settings, graph = {"block_length": block_length}, random_graph(4, 6, block_length)
    config = {"speculative_config": speculation(graph, budget)} if budget else {}
    requests = [None, *(LoRARequest(path.name, i, str(path)) for i, path in enumerate(adapters, 1))]
    cases = cases_of(family, len(oracles))
    with_head = add_module(adapters[0], "model.transformer.ff_out" if family == "llada" else "lm_head")
    turns = [i % len(oracles) for i in range(len(cases))]
    with engine(checkpoint, settings, **OPTIONS, **config) as llm:
        outputs = generate(llm, cases, [requests[turn] for turn in turns])
        again = generate(llm, cases[-3:], [requests[turn] for turn in turns[-3:]])
        with pytest.raises(ValueError, match=r"but received \['lm_head'"):
            llm.llm_engine.add_lora(LoRARequest("head", 3, str(with_head)))
    expected = [oracles[turn].tokens(case, settings) for turn, case in zip(turns, cases, strict=True)]
    assert [list(output.outputs[0].token_ids) for output in outputs] == expected
    assert len({tuple(tokens) for tokens in expected[-3:]}) == 3, "the adapters change too little"
    assert [list(output.outputs[0].token_ids) for output in again] == expected[-3:]
    assert {output.num_cached_tokens for output in again} == {32 if family == "sdar" else 0}  # each finds its own pages
    if budget == 4:
        accepted = sum(output.kv_transfer_params["dllm"]["accepted"] for output in outputs)
        told = [
            oracles[turn].speculative(case, settings, graph, budget) for turn, case in zip(turns, cases, strict=True)
        ]
        assert accepted == sum(each.num_accepted for each in told) >= 8


@pytest.mark.always
@pytest.mark.parametrize("name", ["lm_head", "embed_tokens", "attn_out"])
def test_modules_without_adapters_are_refused_at_start(name: str) -> None:
    from vllm import EngineArgs

    with pytest.raises(ValueError, match=r"lora_target_modules is .*; allowed are q_proj, "):
        EngineArgs(
            model=str(CHECKPOINT), max_model_len=128, load_format="dummy", enable_lora=True, lora_target_modules=[name]
        ).create_engine_config()
