"""All policies, a user's too, and LLaDA2.2's on its model: with async scheduling, on two ranks, and with too few pages.

Tokens and steps are those of the plain statements.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.ahead import scheduled_ahead, scheduler_of
from tests.e2e.growing import preemptions
from tests.e2e.llada2 import LLaDA2Oracle
from tests.e2e.llada22 import BLOCK, MAX_MODEL_LEN, cases, make_random, took
from tests.e2e.rig import Oracle, engine, random_graph, run_outputs, speculation
from tests.e2e.sdar import sdar_cases
from tests.e2e.stated import stated_cases
from tests.e2e.torch_cases import SETTINGS, check_own, offered_by, patient_cases, write_package

pytestmark = [pytest.mark.engine, pytest.mark.slow("configurations")]

WAYS = [
    pytest.param("async", marks=pytest.mark.xdist_group("policies ahead")),
    pytest.param("two ranks", marks=[pytest.mark.xdist_group("both cores"), pytest.mark.slow("ranks")]),
]
FEW_PAGES = pytest.param("few pages", marks=pytest.mark.xdist_group("policies ahead"))


@pytest.fixture
def options(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Arguments of engines that run so."""
    if request.param == "async":
        with scheduled_ahead():
            yield {"async_scheduling": True, "max_num_seqs": 7}
    elif request.param == "few pages":
        yield {"num_gpu_blocks_override": 12}
    else:
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
        yield {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}


def check_way(llm: Any, options: dict[str, Any]) -> None:
    config = llm.llm_engine.vllm_config
    if "async_scheduling" in options:
        assert config.max_concurrent_batches == 2
        assert not scheduler_of(llm).rows.known
    else:
        assert config.parallel_config.tensor_parallel_size == options.get("tensor_parallel_size", 1)


@pytest.mark.parametrize("options", [*WAYS, FEW_PAGES], indirect=True)
def test_policies_are_their_statements(
    options: dict[str, Any], mild: Path, mild_oracle: Oracle, tmp_path: Path
) -> None:
    """Sixteen at once, some at a temperature, with drafts; sequences that grow are preempted where pages are few."""
    write_package(tmp_path)
    own = [*stated_cases(3, (None, 1, 2)), *patient_cases()[1:4]]
    drafts = speculation(random_graph(12, 12, 8), 5)
    with (
        offered_by(tmp_path),
        engine(mild, SETTINGS, speculative_config=drafts, **options) as llm,
        preemptions(llm) as preempted,
    ):
        outputs = run_outputs(llm, own)
        check_way(llm, options)
    replies = [(list(output.outputs[0].token_ids), output.kv_transfer_params["dllm"]) for output in outputs]
    assert [tokens for tokens, _ in replies] == [case.expected(mild_oracle)[0] for case in own]
    # Who was preempted began a block anew.
    whole = [i for i, output in enumerate(outputs) if output.request_id not in preempted]
    assert check_own(mild_oracle, [own[i] for i in whole], [replies[i] for i in whole]) > 0
    assert {numbers["exactness"] for _, numbers in replies} == {"exact"}
    assert len({*preempted}) >= 3 or "num_gpu_blocks_override" not in options, "too few were preempted"


@pytest.fixture(scope="session")
def llada22(tmp_path_factory: pytest.TempPathFactory) -> LLaDA2Oracle:
    return make_random(tmp_path_factory.mktemp("llada22") / "checkpoint")


@pytest.mark.parametrize("options", WAYS, indirect=True)
def test_deletions_and_insertions(options: dict[str, Any], llada22: LLaDA2Oracle) -> None:
    own, others = cases(1, 6), sdar_cases(BLOCK, seed=25)[:2]
    options = {"speculative_config": speculation(random_graph(8, 12, BLOCK), 6), **options}
    with engine(llada22.checkpoint, {}, max_model_len=MAX_MODEL_LEN, block_size=BLOCK, **options) as llm:
        outputs = run_outputs(llm, [*own, *others])
        check_way(llm, options)
    assert took(outputs[: len(own)]) == [case.expected(llada22) for case in own]
    assert [list(output.outputs[0].token_ids) for output in outputs[len(own) :]] == [
        llada22.tokens(case, {"block_length": BLOCK}) for case in others
    ]
    assert sum(output.kv_transfer_params["dllm"]["accepted"] for output in outputs) > 0
