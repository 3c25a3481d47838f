"""LLaDA2.2 in the engine == its reference, in fp32: experts of a block, deletions and insertions, drafts, few pages.

What it has in common with LLaDA2.0 is tested there, and the policy beside all others in `test_torch_policies`.
"""

import dataclasses
from typing import Any

import pytest

from tests.e2e.interference import check_interference
from tests.e2e.llada2 import LLaDA2Oracle
from tests.e2e.llada22 import BLOCK, DELETE, MASK, MAX_MODEL_LEN, SPLIT, IndelCase, cases, make_random, took
from tests.e2e.rig import random_graph, run, run_outputs, shared_engine, speculation
from tests.e2e.sdar import sdar_cases

pytestmark = [pytest.mark.engine, pytest.mark.slow("answers"), pytest.mark.xdist_group("llada22")]

GRAPH = random_graph(8, 12, BLOCK)


@pytest.fixture(scope="session")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> LLaDA2Oracle:
    return make_random(tmp_path_factory.mktemp("llada22") / "checkpoint")


@pytest.fixture
def llm(oracle: LLaDA2Oracle) -> Any:
    """An engine that is told nothing of decoding, with pages for one long request and a few short ones."""
    return shared_engine(
        oracle.checkpoint,
        {},
        speculative_config=speculation(GRAPH, 6),
        max_model_len=MAX_MODEL_LEN,
        block_size=BLOCK,
        num_gpu_blocks_override=16,
    )


def test_mixed_batches_with_drafts_and_without_equal_the_reference(llm: Any, oracle: LLaDA2Oracle) -> None:
    own, others = cases(1, 12), sdar_cases(BLOCK, seed=25)[:4]
    expected, settings = [case.expected(oracle) for case in own], {"block_length": BLOCK}
    assert sum(case.expected(oracle, 370, 371) != its for case, its in zip(own, expected, strict=True)) >= 8
    for drafts in (True, False):
        outputs = run_outputs(llm, [*(dataclasses.replace(case, drafts=drafts) for case in own), *others])
        found = took(outputs[: len(own)])
        assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
        # Whoever is preempted for want of pages begins its block anew.
        again = [steps - least for (_, steps), (_, least) in zip(found, expected, strict=True)]
        assert min(again) == 0
        assert again.count(0) >= len(own) - 4
        assert [list(output.outputs[0].token_ids) for output in outputs[len(own) :]] == [
            oracle.tokens(case, settings) for case in others
        ]
        numbers = [output.kv_transfer_params["dllm"] for output in outputs[: len(own)]]
        assert {n["exactness"] for n in numbers} == {"exact"}
        assert drafts == any(n["proposed"] for n in numbers)
    assert not {MASK, DELETE, SPLIT} & {token for tokens, _ in expected for token in tokens}


def test_a_request_alone_and_behind_a_cached_prompt_has_the_same_tokens(llm: Any, oracle: LLaDA2Oracle) -> None:
    """Experts are chosen for the block alone; a request that names nothing has the model's rule."""
    prompt = tuple(5 + (7 * i) % 90 for i in range(75))
    case = IndelCase(prompt, 41)
    assert llm.llm_engine.reset_prefix_cache()
    outputs = [run_outputs(llm, [each])[0] for each in (case, case)]
    default = llm.get_default_sampling_params()
    default.max_tokens, default.ignore_eos = 41, True
    assert default.temperature == 0.0
    outputs += llm.generate([{"prompt_token_ids": list(prompt)}], default, use_tqdm=False)
    published = dataclasses.replace(case, threshold=0.5).expected(oracle)
    assert took(outputs) == [case.expected(oracle)] * 2 + [published]
    assert [output.num_cached_tokens for output in outputs] == [0, 64, 64]
    some = cases(2, 3)
    assert [run(llm, [each])[0] for each in some] == [each.expected(oracle)[0] for each in some]


def test_preemption_and_aborts_leave_the_others_alone(llm: Any, oracle: LLaDA2Oracle) -> None:
    check_interference(llm, cases(3, 8), lambda case: case.expected(oracle)[0], lambda number: number in (6, 15, 28))
