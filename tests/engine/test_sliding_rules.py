"""Windows that slide: what a server and a request may ask for, and what the scheduler gives them."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm.sampling_params import SamplingParams

from tests.e2e.wedlm import make_wild
from tests.engine.scheduler_rig import request
from vllm_dllm import plugin
from vllm_dllm.blocks import max_prompt_len, row_blocks
from vllm_dllm.config import DllmConfig, parse_request_options
from vllm_dllm.draft.acceptance import RequestAcceptance
from vllm_dllm.draft.budget import BudgetRule
from vllm_dllm.draft.windows import WindowDrafter
from vllm_dllm.engine import config_hook
from vllm_dllm.engine.configs import settings_of, spiffy_of
from vllm_dllm.engine.plan import Role
from vllm_dllm.engine.plan_windows import plan_windows
from vllm_dllm.engine.refusals import RequestError
from vllm_dllm.engine.report import StepOrder
from vllm_dllm.engine.rows import StepRows
from vllm_dllm.engine.sliding_rules import check_options
from vllm_dllm.engine.step_sizes import SLIDING_SCHEDULER
from vllm_dllm.engine.window_scheduler import SlidingScheduler
from vllm_dllm.errors import ConfigError

W = 16
SETTINGS = DllmConfig(kv_policy="window", block_length=W)
LLADA = Path(__file__).parents[2] / "examples/tiny_llada/checkpoint"
GRAPH = str(LLADA.parent / "graph.json")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wedlm") / "checkpoint"
    make_wild(path, has_biases=False)
    return path


def engine_config(path: Path, settings: dict[str, Any], **changes: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    plugin.register()
    args = EngineArgs(str(path), dtype="float32", max_model_len=128, additional_config={"dllm": settings}, **changes)
    return args.create_engine_config()


def test_a_server_has_the_published_values(checkpoint: Path) -> None:
    config = engine_config(checkpoint, {})
    settings = settings_of(config)
    assert (settings.block_length, settings.kv_policy) == (16, "window")
    assert (settings.entropy_bound, settings.position_penalty) == (0.4, 0.02)
    assert config.scheduler_config.scheduler_cls == SLIDING_SCHEDULER
    assert config.cache_config.enable_prefix_caching
    assert config.model_config.get_diff_sampling_param()["temperature"] == 0.2
    assert settings_of(engine_config(checkpoint, {"position_penalty": 0.0, "block_length": 8})).position_penalty == 0.0


@pytest.mark.parametrize(
    ("settings", "changes", "message"),
    [
        ({"policy": "static"}, {}, "additional_config.dllm has policy, but the windows of this model are decided by"),
        ({"threshold": 0.9, "entropy_bound": 1.0}, {}, "has threshold, but the windows"),
        ({"kv_policy": "causal"}, {}, "kv_policy is 'causal', but WeDLMForCausalLM decides a window that slides"),
        ({"position_penalty": -0.1}, {}, "position_penalty is -0.1, allowed are null and finite numbers from 0 on"),
        ({}, {"async_scheduling": True}, "async_scheduling is on, but the host must know how many tokens of a window"),
        (
            {},
            {"speculative_config": {"method": "spiffy", "draft_graph": GRAPH}},
            "speculative_config.draft_graph is ",
        ),
        (
            {},
            {"speculative_config": {"method": "spiffy", "num_speculative_tokens": 4}},
            "num_speculative_tokens is 4, but drafts",
        ),
    ],
)
def test_what_windows_cannot_be_with(
    checkpoint: Path, settings: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        engine_config(checkpoint, settings, **changes)


def test_models_with_blocks_have_no_penalty() -> None:
    with pytest.raises(ConfigError, match=r"position_penalty is 0.1, but the model has no windows"):
        engine_config(LLADA, {"position_penalty": 0.1})
    with pytest.raises(ConfigError, match=r"kv_policy is 'window', but LLaDAModelLM sees what follows a block"):
        engine_config(LLADA, {"kv_policy": "window"})


@pytest.mark.parametrize(
    ("extra_args", "message"),
    [
        ({"dllm_policy": "threshold"}, "dllm_policy is 'threshold', but this model decides a window"),
        ({"dllm_steps": 4}, "dllm_steps is 4, but this model decides a window"),
        ({"dllm_suffix": [5]}, "dllm_suffix is [5], but this model decides a window"),
        ({"dllm_canvas": [5, None]}, "dllm_canvas is [5, None], but this model decides a window"),
        ({"dllm_logits_eos_inf": True}, "dllm_logits_eos_inf is True, but this model decides a window"),
        ({"dllm_threshold": 0.5}, "allowed are dllm_entropy_bound and dllm_position_penalty; remove it"),
    ],
)
def test_options_that_a_window_ignores_are_refused(extra_args: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=re.escape(message)):
        check_options(SamplingParams(), parse_request_options(extra_args))
    with pytest.raises(RequestError, match="logprobs is 0, but the windows of this model keep no"):
        check_options(SamplingParams(logprobs=0), parse_request_options({}))


def test_options_of_windows_are_taken() -> None:
    own = {"dllm_entropy_bound": 0.1, "dllm_position_penalty": 0, "dllm_speculation": False, "dllm_stream": "denoising"}
    check_options(SamplingParams(), parse_request_options(own))


def test_rows_are_as_long_as_the_model_whatever_is_asked_for() -> None:
    assert max_prompt_len(SETTINGS, 128) == 127
    assert [row_blocks(n, 1, SETTINGS, 128).end for n in (5, 100, 127)] == [128, 128, 128]
    assert not len(row_blocks(128, 60, SETTINGS, 128))


def test_a_step_has_the_window_and_what_it_stores() -> None:
    rows = StepRows(SETTINGS, 128, 1000)
    running = [request("a", 20), request("b", 120)]
    for each, stored in zip(running, (17, 120), strict=True):
        each.max_tokens = 50
        rows.kv.add(each.request_id, 0)
        rows.kv.note(each.request_id, stored)
    scheduler = object.__new__(SlidingScheduler)
    scheduler.rows, scheduler.running, scheduler._placeholders, scheduler.current_step = rows, running, [-1] * W, 7
    scheduler._num_held, scheduler.rule, scheduler._canvases = 0, None, {}
    scheduler._choose_rows()
    assert rows.given == {"a": 16 + 3, "b": 8}, "three tokens are final and not stored; another row ends"
    assert [len(each.spec_token_ids) for each in running] == [16, 8]
    assert [scheduler._paged_end(each) for each in running] == [20, 120], "windows are in flight alone"
    rows.max_rows = 20
    scheduler._choose_rows()
    assert (rows.given, scheduler._num_held) == ({"a": 19}, 1)
    assert running[1].next_decode_eligible_step == 9
    new = request("c", 125)
    assert (rows.num_first(new), rows.first(new, 96)) == (3, 29 + 3)


def test_a_resumed_request_brings_its_window(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_dllm.engine.scheduler import DllmScheduler

    scheduler = object.__new__(SlidingScheduler)
    scheduler._check, scheduler._canvases = None, {"a": [-1, 7], "b": [-1, -1]}
    scheduler._drafts = {"a": (17, 18), "b": (16,), "d": (19,)}
    order = StepOrder(("a", "b", "c"), None)
    monkeypatch.setattr(DllmScheduler, "_update_after_schedule", lambda _self, _output: None)
    output = SimpleNamespace(
        scheduled_new_reqs=[SimpleNamespace(req_id="a"), SimpleNamespace(req_id="c")],
        num_scheduled_tokens={"a": 16, "b": 32, "c": 20},
        aux_output_connector_metadata=order,
    )
    scheduler._update_after_schedule(output)
    told = output.aux_output_connector_metadata
    assert (told.canvases, told.shows_canvas) == ({"a": [-1, 7]}, True)
    assert told.drafts == {"b": (16,)}, "of those that take the step and keep their slots"


def drafting(rows: StepRows, windows: dict[str, list[int]], budget: int) -> tuple[Any, list[Any]]:
    """Return a scheduler of requests with 20 tokens, behind a step that left these windows, and the requests."""
    running = [request(name, 20) for name in windows]
    for each in running:
        each.max_tokens, each.num_output_tokens = 50, 12
        rows.kv.add(each.request_id, 0)
        rows.kv.note(each.request_id, 20)
    scheduler = object.__new__(SlidingScheduler)
    scheduler.rows, scheduler.running, scheduler.waiting = rows, running, []
    scheduler._placeholders, scheduler.current_step, scheduler._num_held = [-1] * 2 * W, 7, 0
    scheduler.block_length, scheduler.acceptance, scheduler._canvases = W, RequestAcceptance(), windows
    scheduler.rule = BudgetRule(WindowDrafter(W - 1).prior(), W, budget)
    return scheduler, running


def test_drafts_have_the_rows_that_the_reports_tell() -> None:
    """Of the second request, the first draft knows position 0 and so has two at its front; a third has no draft."""
    windows = {"a": [-2, 7, -3, *[-1] * 13], "b": [-3, 7, -2, *[-1] * 13], "c": [-1] * 16}
    scheduler, running = drafting(StepRows(SETTINGS, 128, 1000), windows, budget=4)
    scheduler._choose_rows()
    assert scheduler._drafts == {"a": (18, 19), "b": (16, 19)}
    assert scheduler.rows.given == {"a": 16 + 37, "b": 16 + 35, "c": 16}
    assert [len(each.spec_token_ids) for each in running] == [32, 32, 16]
    assert scheduler._num_drafts(None, dict.fromkeys("abc")) == {"a": 4, "b": 4, "c": 0}, (
        "as the budget expects of them"
    )
    assert [scheduler._counted(len(each.spec_token_ids), 20) for each in running] == [(1, 16)] * 3
    running[0].max_tokens = 14  # its reply is over with what the first draft knows
    running[1].sampling_params = SimpleNamespace(extra_args={"dllm_budget": 1})
    scheduler._choose_rows()
    assert scheduler._drafts == {"b": (16,)}
    assert scheduler._num_drafts(None, dict.fromkeys("abc")) == {"a": 0, "b": 1, "c": 0}, "it asked for no more"


def test_drafts_are_cut_to_the_rows_of_a_step_and_to_the_request() -> None:
    window = [-2, -3, -4, *[-1] * 13]
    scheduler, running = drafting(StepRows(SETTINGS, 38, 16 + 17 + 18), {"a": window}, budget=3)
    scheduler._choose_rows()
    assert scheduler._drafts == {"a": (17, 18)}, "the row ends behind 18 positions, and the step's rows are 51"
    assert len(running[0].spec_token_ids) == 18
    assert scheduler._num_drafts(None, {"a": None}) == {"a": 2}, "for which there is room"


def test_drafts_leave_the_rows_of_the_longest_prompt_that_may_wait() -> None:
    """A draft has 17 rows and more where a window has 16: of two drafts that windows leave room for, one is left."""
    window = [-2, -3, -4, *[-1] * 13]
    scheduler, _ = drafting(StepRows(SETTINGS, 128, 128 + 3 * 16), {"a": window}, budget=2)
    scheduler.waiting = ["b"]
    scheduler._choose_rows()
    assert (scheduler._drafts, scheduler.rows.free) == ({"a": (17,)}, 128 + 15)
    assert scheduler._num_drafts(None, {"a": None}) == {"a": 1}, "it could have no more"
    scheduler.waiting = []
    scheduler._choose_rows()
    assert scheduler._drafts == {"a": (17, 18)}


def test_a_chain_is_as_long_as_the_window_allows(checkpoint: Path) -> None:
    for given, expected in (({}, (None, 10)), ({"max_nodes": 40}, (None, 15)), ({"budget": 40}, (15, 15))):
        config = engine_config(checkpoint, {}, speculative_config={"method": "spiffy", **given})
        found = spiffy_of(config)
        assert found is not None
        assert (found.budget, found.max_nodes) == expected
        assert found.exactness == "exact"
        assert config.diffusion_config.canvas_length == 2 * W
    assert len(found.warnings) == 1
    assert "budget is 40, but the chain of a window of 16 has 15 nodes" in found.warnings[0]
    assert engine_config(checkpoint, {}).diffusion_config.canvas_length == W
    none = engine_config(checkpoint, {}, speculative_config={"method": "spiffy", "budget": 0})
    assert none.diffusion_config.canvas_length == W


def test_a_server_says_that_its_drafts_are_a_chain(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(config_hook.logger, "info", lambda text, *values: said.append(text % values))
    config = engine_config(checkpoint, {}, speculative_config={"method": "spiffy"})
    [spiffy] = [line for line in said if line.startswith("Spiffy")]
    assert spiffy == (
        "Spiffy: the chain of a window of 16, up to 15 later windows, at most 10 drafts per step, budget auto, "
        "tokens are exactly those without speculation"
    )
    assert "speculative_config={'method': 'spiffy', 'budget': 'auto', 'max_nodes': 10}" in str(config)
    said.clear()
    engine_config(LLADA, {}, speculative_config={"method": "spiffy", "draft_graph": GRAPH})
    assert any(f"Spiffy: draft graph {GRAPH} with " in line for line in said)


def test_the_segments_of_a_step() -> None:
    rows = StepRows(SETTINGS, 128, 1000)
    for name, stored in (("a", 17), ("b", 120)):
        rows.kv.add(name, 0)
        rows.kv.note(name, stored)
    known = np.array([20, 120])
    kv = rows.kv.step(["a", "b"], known, np.array([128, 128]))
    plan = plan_windows(kv, start=known, length=np.array([16, 8]), block_length=W)
    assert plan.role.tolist() == [Role.PREFILL, Role.ROOT, Role.ROOT]
    assert (plan.begin.tolist(), plan.end.tolist()) == ([17, 20, 120], [20, 36, 128])
    assert plan.context.tolist() == [[0, 17, 20, 20], [0, 20, 36, 36], [0, 120, 128, 128]]
    assert plan.num_stored.tolist() == [3, 0]


def test_the_segments_of_a_step_with_drafts() -> None:
    """Each draft sees what is stored before the root, as the root does, and itself."""
    rows = StepRows(SETTINGS, 128, 1000)
    for name, stored in (("a", 17), ("b", 30)):
        rows.kv.add(name, 0)
        rows.kv.note(name, stored)
    known = np.array([20, 30])
    kv = rows.kv.step(["a", "b"], known, np.array([128, 128]))
    drafts = [(18, 19), ()]
    plan = plan_windows(kv, start=known, length=np.array([16, 16]), block_length=2 * W, drafts=drafts)
    assert plan.role.tolist() == [Role.PREFILL, Role.ROOT, Role.DRAFT, Role.DRAFT, Role.ROOT]
    assert (plan.begin.tolist(), plan.end.tolist()) == ([17, 20, 20, 20, 30], [20, 36, 38, 39, 46])
    assert plan.context[2:, :2].tolist() == [[0, 20], [0, 20], [0, 30]]
    assert (plan.max_drafts, plan.num_stored.tolist()) == (2, [3, 0])
    made = plan.rows()
    assert made.node.tolist() == [[0, 1, 2], [3, -1, -1]]
    assert made.head.shape == (4, 2 * W)
    assert made.source[3 + 16 : 3 + 16 + 18].tolist() == [*range(2 * W, 2 * W + 18)], "of the first draft's canvas"
