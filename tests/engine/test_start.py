"""What the start of an engine says: of what cannot work, before its processes start, and nothing that is not true."""

import functools
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from vllm_dllm import plugin
from vllm_dllm.errors import ConfigError

CHECKPOINT = Path(__file__).parents[2] / "examples/tiny_llada/checkpoint"
GIB = 1 << 30
PAGE = 128  # tokens, of a CPU by default


@functools.lru_cache
def engine_config(**changes: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    plugin.register()
    args = EngineArgs(str(CHECKPOINT), dtype="float32", max_num_seqs=4, **changes)
    return args.create_engine_config()


def start(config: Any) -> None:
    """Go as far as vLLM goes with `LLM` and `vllm serve` before it starts processes; with no engine there are none."""
    from vllm.v1.engine.utils import CoreEngineProcManager
    from vllm.v1.executor.abstract import Executor

    CoreEngineProcManager(
        local_engine_count=0,
        start_index=0,
        local_start_index=0,
        vllm_config=config,
        local_client=True,
        handshake_address="",
        executor_class=Executor,
        log_stats=False,
    )


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Give the machine nodes of memory: (total, available) in GiB."""
    from vllm_dllm.engine import start_checks

    monkeypatch.setattr(start_checks.current_platform, "is_cpu", lambda: True)

    def have(*nodes: tuple[float, float]) -> None:
        infos = [SimpleNamespace(total_memory=int(t * GIB), available_memory=int(a * GIB)) for t, a in nodes]
        monkeypatch.setattr(start_checks, "get_visible_memory_node", lambda: list(range(len(infos))))
        monkeypatch.setattr(start_checks, "get_memory_node_info", infos.__getitem__)

    return have


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ({}, "gpu_memory_utilization is 0.92, on a CPU too, which asks for 14.7 GiB"),
        ({"gpu_memory_utilization": 0.5}, "gpu_memory_utilization is 0.5, on a CPU too, which asks for 8.0 GiB"),
        ({"kv_cache_memory_bytes": 9 * GIB}, f"kv_cache_memory_bytes is {9 * GIB}, which is 9.0 GiB"),
    ],
)
def test_too_little_memory_is_told_before_processes_start(given: dict[str, Any], asked: str, memory: Any) -> None:
    memory((16, 7), (16, 4))
    with pytest.raises(ConfigError) as refused:
        start(engine_config(**given))
    # 4 requests of 256 tokens in 4 layers of 4 heads of 32, and a page
    num_bytes = (4 * 256 + PAGE) * _bytes_per_token()
    assert str(refused.value) == (
        f"{asked}, but 7.0 of the 16.0 GiB of memory are free; allowed is what is free; start with "
        f"--kv-cache-memory-bytes {num_bytes}, which is taken for K/V beside the weights, or with "
        "--gpu-memory-utilization 0.35, for both together"
    )


def _bytes_per_token() -> int:
    config = engine_config().model_config.hf_config
    return int(2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4)


def test_what_fits_starts_and_other_models_are_left_to_vllm(memory: Any) -> None:
    from vllm_dllm.engine.start_checks import check_start

    memory((16, 15))
    start(engine_config())
    memory((16, 1))
    start(engine_config(kv_cache_memory_bytes=GIB // 2))
    check_start(SimpleNamespace(model_config=SimpleNamespace(architectures=["LlamaForCausalLM"])))  # type: ignore[arg-type]


def test_memory_for_kv_that_holds_no_request_is_told_before_processes_start(memory: Any) -> None:
    memory((16, 15))
    least = (256 + PAGE) * _bytes_per_token()  # a request of 256 tokens, and the page that vLLM keeps
    for given in (-1, 0, 1, least - 1):
        with pytest.raises(
            ConfigError, match=rf"^kv_cache_memory_bytes is {given}, .* max_model_len 256 take {least}, "
        ):
            start(engine_config(kv_cache_memory_bytes=given))
    start(engine_config(kv_cache_memory_bytes=least))


def test_a_number_of_pages_that_holds_no_request_is_told_before_processes_start(memory: Any) -> None:
    memory((16, 15))
    least = 256 // PAGE + 1
    for given in (0, 1, least - 1):
        with pytest.raises(
            ConfigError, match=rf"^num_gpu_blocks_override is {given}, .* max_model_len 256 take {least} pages"
        ):
            start(engine_config(num_gpu_blocks_override=given, kv_cache_memory_bytes=GIB // 2))
    start(engine_config(num_gpu_blocks_override=least, kv_cache_memory_bytes=GIB // 2))


def run_as_main(path: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_dllm.engine.start_checks import check_main_guard

    path.write_text(source)
    main = ModuleType("__main__")
    main.__dict__.update(__file__=str(path), start=check_main_guard)
    monkeypatch.setitem(sys.modules, "__main__", main)
    exec(compile(source, path, "exec"), vars(main))


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("x = 1\nstart()\n", 2),
        ("def f():\n    start()\n\ntry:\n    f()\nfinally:\n    pass\n", 5),
        ('if __name__ == "main":\n    pass\nstart()\n', 3),
    ],
)
def test_a_script_without_a_guard_is_told_the_line(
    source: str, line: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "script.py"
    with pytest.raises(ConfigError, match=rf"script.py, line {line} starts an engine .* under `if __name__ == \"__m"):
        run_as_main(path, source, monkeypatch)


@pytest.mark.parametrize(
    "source",
    ['if __name__ == "__main__":\n    start()\n', 'def f():\n    start()\n\nif __name__ == "__main__":\n    f()'],
)
def test_a_script_with_a_guard_starts(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_as_main(tmp_path / "script.py", source, monkeypatch)


def test_nobodys_script_is_checked_in_a_notebook_or_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_dllm.engine.start_checks import check_main_guard

    check_main_guard()  # in pytest, which is guarded
    notebook = ModuleType("__main__")
    notebook.__dict__["start"] = check_main_guard
    monkeypatch.setitem(sys.modules, "__main__", notebook)
    exec(compile("start()", "<cell 1>", "exec"), vars(notebook))


def test_vllm_warns_of_nothing_that_we_set(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.config import CompilationConfig, CompilationMode, SchedulerConfig, VllmConfig, model, scheduler, vllm

    from vllm_dllm.engine.scheduler import DllmScheduler

    said: list[str] = []
    for module in (vllm, scheduler, model):
        monkeypatch.setattr(module.logger, "warning_once", lambda message, *args, **_: said.append(message))
    engine_config.cache_clear()
    config = engine_config()
    config.__post_init__()  # as the engine's process does again
    assert config.compilation_config.mode == CompilationMode.NONE
    assert config.scheduler_config.get_scheduler_cls() is DllmScheduler
    assert config.model_config.get_diff_sampling_param() == {"temperature": 0.0, "max_tokens": 128}
    parts = ("Inductor", "custom scheduler", "Default vLLM sampling")
    assert [message for message in said if any(part in message for part in parts)] == []
    # What others set they are told of, also after one of our models.
    VllmConfig(compilation_config=CompilationConfig(mode=0))
    others = SchedulerConfig.default_factory(scheduler_cls="vllm_dllm.engine.scheduler.DllmSchedulerOfAUser")
    with pytest.raises(AttributeError):
        others.get_scheduler_cls()
    assert [any(part in message for message in said) for part in parts] == [True, True, False]


def test_the_printed_configuration_names_spiffy() -> None:
    assert "speculative_config=None" in str(engine_config())
    config = engine_config(speculative_config='{"method": "spiffy", "max_nodes": 3}')
    assert "speculative_config={'method': 'spiffy', 'draft_graph': 'default', 'budget': 'auto', 'max_nodes': 3}" in str(
        config
    )
    config = engine_config(speculative_config='{"method": "spiffy", "budget": 2}')
    assert "speculative_config={'method': 'spiffy', 'draft_graph': 'default', 'budget': 2}" in str(config)


def test_a_length_that_fits_itself_needs_memory_for_the_shortest_request_alone(memory: Any) -> None:
    from vllm_dllm.engine.kv_memory import fit_max_model_len

    memory((16, 15))
    settings = {"dllm": {"block_length": 8}}
    least = 2 * PAGE * _bytes_per_token()  # a token and a block, and the page of vLLM's own

    def config(**changes: Any) -> Any:
        engine_config.cache_clear()
        return engine_config.__wrapped__(max_model_len=-1, additional_config=settings, **changes)

    with pytest.raises(ConfigError, match=rf"^kv_cache_memory_bytes is {least - 1}, .* of one token take {least}, "):
        start(config(kv_cache_memory_bytes=least - 1))
    start(config(kv_cache_memory_bytes=least))
    with pytest.raises(ConfigError, match=r"^num_gpu_blocks_override is 1, .* of one token take 2 pages"):
        start(config(num_gpu_blocks_override=1, kv_cache_memory_bytes=GIB // 2))

    fitted, whole, given = config(), config(), engine_config.__wrapped__(max_model_len=200)
    fit_max_model_len(fitted, 256 // PAGE)
    fit_max_model_len(whole, 256 // PAGE + 1)
    fit_max_model_len(given, 2)
    assert [each.model_config.max_model_len for each in (fitted, whole, given)] == [256 - PAGE, 256, 200]
