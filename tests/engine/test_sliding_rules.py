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
from vllm_dllm.engine.configs import settings_of
from vllm_dllm.engine.plan import Role
from vllm_dllm.engine.plan_windows import plan_windows
from vllm_dllm.engine.refusals import RequestError
from vllm_dllm.engine.rows import StepRows
from vllm_dllm.engine.sliding_rules import check_options
from vllm_dllm.engine.step_sizes import SLIDING_SCHEDULER
from vllm_dllm.engine.window_scheduler import SlidingScheduler
from vllm_dllm.errors import ConfigError

W = 16
SETTINGS = DllmConfig(kv_policy="window", block_length=W)
LLADA = Path(__file__).parents[2] / "examples/tiny_llada/checkpoint"


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
        ({}, {"speculative_config": {"method": "spiffy"}}, "'spiffy', but a window that slides has no drafts here"),
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
    scheduler._num_held = 0
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
    from vllm_dllm.engine.report import StepOrder
    from vllm_dllm.engine.scheduler import DllmScheduler

    scheduler = object.__new__(SlidingScheduler)
    scheduler._check, scheduler._canvases = None, {"a": [-1, 7], "b": [-1, -1]}
    order = StepOrder(("a", "c"), None)
    monkeypatch.setattr(DllmScheduler, "_update_after_schedule", lambda _self, _output: None)
    output = SimpleNamespace(
        scheduled_new_reqs=[SimpleNamespace(req_id="a"), SimpleNamespace(req_id="c")],
        aux_output_connector_metadata=order,
    )
    scheduler._update_after_schedule(output)
    assert output.aux_output_connector_metadata.canvases == {"a": [-1, 7]}
    assert output.aux_output_connector_metadata.shows_canvas


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
