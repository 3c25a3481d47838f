"""All policies in one batch, with drafts, and after preemptions: engine == plain statements, in fp32."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from vllm import envs

from tests.e2e.rig import Oracle, mixed_cases, random_graph, run_outputs, shared_engine, speculation, step_all
from tests.e2e.stated import stated_cases
from tests.e2e.torch_cases import BLOCK, SETTINGS, cases, check_own

pytestmark = [pytest.mark.engine, pytest.mark.slow("engines"), pytest.mark.xdist_group("policies in torch code")]


@pytest.fixture
def llm(mild: Path) -> Any:
    config = speculation(random_graph(12, 12, 8), 5)
    return shared_engine(mild, SETTINGS, speculative_config=config, max_model_len=1024, max_num_batched_tokens=8192)


@pytest.mark.always
def test_all_in_one_batch_beside_native_ones(llm: Any, mild_oracle: Oracle) -> None:
    own, native = cases(1), mixed_cases(BLOCK, seed=7)[:4]
    outputs = run_outputs(llm, [*own, *native])
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    assert tokens[len(own) :] == [mild_oracle.tokens(case, SETTINGS) for case in native]
    took = [output.kv_transfer_params["dllm"] for output in outputs[: len(own)]]
    assert check_own(mild_oracle, own, list(zip(tokens, took, strict=False))) > 0


def test_preempted_ones_end_in_the_tokens_of_their_statements(llm: Any, mild_oracle: Oracle) -> None:
    """All policies, sixteen at once, some at a temperature."""
    own = stated_cases(2)
    preempted = []

    def preempt(number: int, llm: Any) -> None:
        if number in (4, 9, 20, 31):
            preempted.append(len(llm.llm_engine.engine_core.engine_core.scheduler.running))
            assert llm.llm_engine.reset_prefix_cache(reset_running_requests=True)

    assert step_all(llm, own, preempt) == {str(i): case.expected(mild_oracle)[0] for i, case in enumerate(own)}
    assert sum(preempted) > 16, preempted


@pytest.mark.always
def test_an_id_that_is_used_again_at_once_finds_nothing_of_the_one_before(
    llm: Any, mild_oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(vars(envs), "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION", True)  # an engine has read its variable
    keeping = [case for case in stated_cases(2) if case.own.policy in ("eotp", "learn2pd_eotp", "dit_confidence")]
    engine = llm.llm_engine
    for case in keeping:
        for prompt in ((5, 6, 7), (7, 6, 5) * 9):
            own = dataclasses.replace(case, max_tokens=40, prompt=prompt)
            engine.add_request(case.own.policy, {"prompt_token_ids": list(prompt)}, own.sampling_params())
            while engine.has_unfinished_requests():
                outputs = engine.step()
            (output,) = outputs
            check_own(mild_oracle, [own], [(list(output.outputs[0].token_ids), output.kv_transfer_params["dllm"])])
