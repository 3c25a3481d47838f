"""All policies, a user's too, and LLaDA2.2's on its model: with async scheduling, on two ranks, and with too few pages.

Tokens and steps are those of the plain statements.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.ahead import scheduled_ahead, scheduler_of
from tests.e2e.growing import preemptions
from tests.e2e.llada2 import LLaDA2Oracle
from tests.e2e.llada22 import BLOCK, MAX_MODEL_LEN, cases, make_random, took
from tests.e2e.rig import Oracle, engine, random_graph, run_outputs, speculation, step_all
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


@pytest.mark.parametrize("options", WAYS[:1], indirect=True)
def test_what_policies_keep_of_a_request_is_of_blocks_that_the_scheduler_knows(
    options: dict[str, Any], mild: Path, mild_oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A preemption drops what steps under way come to, the ends of blocks too, which are decided anew."""
    own = [
        dataclasses.replace(case, max_tokens=max_tokens, prompt=(5, 6 + i, 7))
        for i, max_tokens in enumerate((40, 32, 24))
        for case in stated_cases(4)
        if case.own.policy in ("eotp", "learn2pd_eotp", "dit_confidence")
    ]
    drafts, num_dropped = speculation(random_graph(12, 12, 8), 5), 0
    with engine(mild, SETTINGS, speculative_config=drafts, **{**options, "max_num_seqs": 9}) as llm:
        scheduler = scheduler_of(llm)
        take = scheduler._take_reports

        def watch(output: Any, reports: Any, *args: Any) -> None:
            nonlocal num_dropped
            gone = [name for name in reports if scheduler.requests[name].num_stale_output_tokens]
            num_dropped += sum(reports[name].finished for name in gone)
            take(output, reports, *args)

        monkeypatch.setattr(scheduler, "_take_reports", watch)

        def preempt(number: int, llm: Any) -> None:
            if number % 7 == 6 and number < 120:
                assert llm.llm_engine.reset_prefix_cache(reset_running_requests=True)

        tokens = step_all(llm, own, preempt)
    assert tokens == {str(i): case.expected(mild_oracle)[0] for i, case in enumerate(own)}
    assert num_dropped >= 3, "too few ends of blocks were dropped"


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
