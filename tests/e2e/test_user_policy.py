"""The example of docs/add-a-policy.md, installed as a package and served with drafts, beside native policies."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.rig import mixed_cases, random_graph, run_outputs, shared_engine, speculation, step_all
from tests.e2e.torch_cases import SETTINGS, PatientCase, check_own, offered_by, patient_cases, write_package

pytestmark = [pytest.mark.engine, pytest.mark.slow("engines"), pytest.mark.xdist_group("policies in torch code")]

BROKEN = """
from vllm_dllm.policy import Decision, TorchPolicy

def decide(seen, state):
    if (seen.step > 1).any():
        raise ZeroDivisionError("no such luck")
    return Decision(seen.canvas)

BROKEN = TorchPolicy(decide)
"""


@pytest.fixture(scope="module")
def _installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Install the page's package, and one that is broken."""
    site = tmp_path_factory.mktemp("site")
    write_package(site, {"broken": BROKEN})
    with offered_by(site):
        yield


@pytest.fixture
def llm(mild: Path, _installed: None) -> Any:
    config = speculation(random_graph(12, 12, 8), 5)
    return shared_engine(mild, SETTINGS, speculative_config=config, max_model_len=1024, max_num_batched_tokens=8192)


def test_the_pages_example_is_served_beside_native_policies(llm: Any, mild_oracle: Any) -> None:
    native, patient = mixed_cases(8, seed=5)[:6], patient_cases()
    outputs = run_outputs(llm, [*native, *patient])
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    assert tokens[:6] == [mild_oracle.tokens(case, SETTINGS) for case in native]
    took = [output.kv_transfer_params["dllm"] for output in outputs]
    assert check_own(mild_oracle, patient, list(zip(tokens, took, strict=True))[6:]) > 0


def test_a_request_at_which_a_policy_raises_ends_alone(llm: Any, mild_oracle: Any) -> None:
    cases = mixed_cases(8, seed=6)[:3]
    prompts = [{"prompt_token_ids": list(case.prompt)} for case in (cases[0], *cases)]
    broken = cases[0].sampling_params(extra_args={"dllm_policy": "broken"})
    first, *others = llm.generate(prompts, [broken, *(case.sampling_params() for case in cases)], use_tqdm=False)
    assert (first.outputs[0].finish_reason, list(first.outputs[0].token_ids)) == ("error", [])
    assert [list(o.outputs[0].token_ids) for o in others] == [mild_oracle.tokens(case, SETTINGS) for case in cases]
    assert run_outputs(llm, cases[:1])[0].outputs[0].finish_reason == "length"


def test_a_preempted_request_ends_in_the_same_tokens(llm: Any, mild_oracle: Any) -> None:
    """Its block begins anew, and with it what the policy kept of it."""
    case = PatientCase((5, 6, 7), 24, threshold=0.05)

    def preempt(number: int, llm: Any) -> None:
        if number in (3, 9):
            assert llm.llm_engine.reset_prefix_cache(reset_running_requests=True)

    assert step_all(llm, [case], preempt) == {"0": case.expected(mild_oracle)[0]}
