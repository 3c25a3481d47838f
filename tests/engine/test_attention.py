"""vLLM's side of attention: the choice is told and kept, and what vLLM asks of a backend follows from it."""

from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.version import Version
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.attention.backend import AttentionCGSupport

from tests.e2e.rig import CHECKPOINT
from vllm_dllm.attention import varlen
from vllm_dllm.attention.choose import IMPLEMENTATIONS
from vllm_dllm.attention.csrc import CsrcAttention
from vllm_dllm.attention.flashinfer import FlashInferAttention
from vllm_dllm.attention.plain import CHUNK_BYTES, PlainAttention
from vllm_dllm.config import AttentionName, DllmConfig
from vllm_dllm.engine import attention, attention_choice, configs
from vllm_dllm.errors import ConfigError, KernelUnavailable
from vllm_dllm.self_test.attention import AttentionShape
from vllm_dllm.self_test.check import Check
from vllm_dllm.self_test.decoding import DecodingShape
from vllm_dllm.self_test.isolated import Request

REFUSES_OTHER_CACHES = Version(version("vllm")) >= Version("0.33")
"""vLLM does it itself from then on."""


def engine_config(**changes: Any) -> Any:
    from vllm import EngineArgs

    values = {"model": str(CHECKPOINT), "max_model_len": 128, "load_format": "dummy", "dtype": "float32"}
    return EngineArgs(**(values | changes)).create_engine_config()


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is logged; vLLM configures its loggers anew at the first engine, so that no handler stays."""
    messages: list[str] = []
    monkeypatch.setattr(attention_choice.logger, "info", lambda text, *values: messages.append(text % values))
    return messages


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, *wrong: str) -> list[Request]:
    """Stand on a GPU whose kernels are right, but for those named; returns what was compared there."""
    asked: list[Request] = []

    def run(request: Request) -> list[Check]:
        asked.append(request)
        kernels = ["vocab_stats"] if request.decoding else []
        kernels += [f"attention {request.attention[0]}"] if request.attention else []
        return [Check(kernel, "a case", 0.5 if kernel in wrong else 0.003, 0.01) for kernel in kernels]

    monkeypatch.setattr(attention_choice, "current_platform", _Gpu)
    monkeypatch.setattr(attention_choice, "run_isolated", run)
    monkeypatch.setattr(CsrcAttention, "unavailable", staticmethod(lambda _: None))
    return asked


class _Gpu:
    device_type = "cuda"

    @staticmethod
    def is_cpu() -> bool:
        return False

    @staticmethod
    def get_device_capability() -> Any:
        return SimpleNamespace(major=9, minor=0)


def stub_config(settings: dict[str, Any], cudagraph_mode: CUDAGraphMode = CUDAGraphMode.FULL) -> Any:
    model = SimpleNamespace(
        architectures=["LLaDAModelLM"],
        hf_config=SimpleNamespace(),
        dtype=torch.bfloat16,
        get_head_size=lambda: 128,
        get_num_attention_heads=lambda parallel: 32 // parallel.tensor_parallel_size,
        get_num_kv_heads=lambda parallel: 8 // parallel.tensor_parallel_size,
        get_vocab_size=lambda: 1000,
        max_model_len=64,
    )
    config: Any = SimpleNamespace(
        model_config=model,
        cache_config=SimpleNamespace(cache_dtype="auto", block_size=16, user_specified_block_size=True),
        compilation_config=SimpleNamespace(cudagraph_mode=cudagraph_mode),
        additional_config={"dllm": settings},
        parallel_config=SimpleNamespace(tensor_parallel_size=2),
    )
    config.dllm = configs.parse(config)
    return config


def test_the_choice_is_told_with_its_reason_and_kept(log: list[str]) -> None:
    settings = {"block_length": 8}
    config = engine_config(additional_config={"dllm": settings})
    isa = torch.ops.vllm_dllm.cpu_isa()
    assert f"Attention: csrc ({isa}): the first of csrc, torch" in log
    assert config.additional_config == {"dllm": {"block_length": 8, "attention": "csrc"}}
    assert settings == {"block_length": 8}
    assert attention.implementation_of(config) is CsrcAttention


def test_a_cache_of_another_dtype_is_for_torch(log: list[str]) -> None:
    if REFUSES_OTHER_CACHES:
        with pytest.raises(ConfigError, match=r'^kv_cache_dtype="bfloat16" is incompatible with dtype="float32"'):
            engine_config(kv_cache_dtype="bfloat16")
        return
    config = engine_config(kv_cache_dtype="bfloat16")
    assert "Attention: torch: csrc: kv_cache_dtype bfloat16 is not the model's float32" in log
    assert attention.implementation_of(config) is PlainAttention


def test_the_named_one_is_taken(log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CsrcAttention, "unavailable", staticmethod(lambda _: pytest.fail("asked for csrc")))
    config = engine_config(additional_config={"dllm": {"attention": "torch"}})
    assert "Attention: torch: as set" in log
    assert attention.implementation_of(config) is PlainAttention


def test_a_missing_kernel_is_an_error_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(op: str, device_type: str) -> None:
        raise KernelUnavailable(f"{op} is not built for {device_type}; build it: `make`")

    monkeypatch.setattr("vllm_dllm.ops.require", missing)
    with pytest.raises(KernelUnavailable, match=r"'csrc', but draft_graph_attention is not built for cpu; build it"):
        engine_config(additional_config={"dllm": {"attention": "csrc"}})
    assert engine_config().additional_config["dllm"]["attention"] == "torch"


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_graphs_are_on_where_they_can_be_captured(
    name: AttentionName, monkeypatch: pytest.MonkeyPatch, log: list[str]
) -> None:
    on_a_gpu(monkeypatch)
    monkeypatch.setattr(IMPLEMENTATIONS[name], "unavailable", staticmethod(lambda _: None))
    config = stub_config({"attention": name})
    attention_choice.set_attention(config, DllmConfig(attention=name))
    has_graphs = name == "csrc"
    assert config.compilation_config.cudagraph_mode == (CUDAGraphMode.FULL if has_graphs else CUDAGraphMode.NONE)
    assert (f"CUDA graphs are off: attention by {name} cannot be captured" in log) is not has_graphs
    support = attention.DllmMetadataBuilder.get_cudagraph_support(config, None)
    assert support == (AttentionCGSupport.ALWAYS if has_graphs else AttentionCGSupport.NEVER)


def test_the_gpu_is_named(monkeypatch: pytest.MonkeyPatch, log: list[str]) -> None:
    on_a_gpu(monkeypatch)
    config = stub_config({})
    attention_choice.set_attention(config, DllmConfig())
    assert any(line.startswith("Attention: csrc (sm_90): the first of csrc, ") for line in log)


def test_a_gpus_kernels_are_compared_first(monkeypatch: pytest.MonkeyPatch, log: list[str]) -> None:
    asked = on_a_gpu(monkeypatch)
    attention_choice.set_attention(stub_config({"block_length": 8}), DllmConfig(block_length=8))
    bfloat16 = torch.bfloat16
    shape = AttentionShape(16, 4, 128, bfloat16, bfloat16, page_size=16, block_length=8, max_len=64)
    assert asked == [Request("cuda", ("csrc", shape), DecodingShape(1000, 8, bfloat16))]
    measured = "attention csrc, a case: error 0.003, allowed 0.01"
    assert any(line.startswith("Self-test (") and line.endswith(measured) for line in log)
    assert any(line.endswith(f"; against plain torch: {measured}") for line in log)


def test_a_native_op_that_is_wrong_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch, "vocab_stats")
    with pytest.raises(KernelUnavailable, match=r"native ops disagree .*\(vocab_stats, a case: error 0.5, "):
        attention_choice.set_attention(stub_config({}), DllmConfig())


def test_attention_that_is_wrong_gives_way_or_stops_the_start(monkeypatch: pytest.MonkeyPatch, log: list[str]) -> None:
    asked = on_a_gpu(monkeypatch, "attention csrc")
    monkeypatch.setattr(FlashInferAttention, "unavailable", staticmethod(lambda _: None))
    config = stub_config({})
    attention_choice.set_attention(config, DllmConfig())
    assert config.additional_config["dllm"]["attention"] != "csrc"
    assert [request.decoding is None for request in asked] == [False, True]
    assert any("csrc: it disagrees with plain torch on this device" in line for line in log)
    with pytest.raises(KernelUnavailable, match="attention is 'csrc', but it disagrees"):
        attention_choice.set_attention(stub_config({"attention": "csrc"}), DllmConfig(attention="csrc"))


@pytest.mark.parametrize("refusal", [None, "the installed vLLM has no FlashAttention"])
def test_it_is_told_who_takes_rows_without_context(
    refusal: str | None, monkeypatch: pytest.MonkeyPatch, log: list[str]
) -> None:
    on_a_gpu(monkeypatch)
    monkeypatch.setattr(varlen, "refusal", lambda setting: refusal)
    attention_choice.set_attention(stub_config({}), DllmConfig())
    by = f"csrc: {refusal}" if refusal else "FlashAttention of vLLM"
    assert f"Attention of refreshes and prefills without context: {by}" in log


@pytest.mark.parametrize(("name", "num_bytes"), [("csrc", 0), ("torch", 2 * CHUNK_BYTES)])
def test_the_profiling_run_takes_what_a_layer_takes(
    name: AttentionName, num_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "get_current_vllm_config", lambda: stub_config({"attention": name}))
    layer: Any = attention.DllmAttentionImpl(4, 32, 0.2, 2)
    taken: list[int] = []

    class Query:
        """Counts what is allocated through it."""

        device = torch.device("cpu")

        def new_empty(self, size: int, dtype: torch.dtype) -> None:
            taken.append(size * dtype.itemsize)

    out = torch.full((3, 4, 32), torch.nan)
    layer.forward(None, Query(), None, None, None, None, out)
    assert (taken, out.abs().max().item()) == ([num_bytes], 0)
