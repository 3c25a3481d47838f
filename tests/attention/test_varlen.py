"""Rows that see nothing stored, by FlashAttention where vLLM has it; a stand-in says what is asked of it."""

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.attention import stand_ins
from tests.attention.scenes import assert_near, captured, causal, denoising, ints, make_scene, mixed, storing
from vllm_dllm.attention import varlen
from vllm_dllm.attention.csrc import CsrcAttention, CsrcPlan
from vllm_dllm.attention.interface import Heads, Setting
from vllm_dllm.attention.layout import HostLayout, forward_layout, host_layout
from vllm_dllm.attention.tiles import query_tiles, workspace_bytes
from vllm_dllm.attention.varlen import VarlenAttention, context_free, context_free_runs, refusal
from vllm_dllm.attention.vllm_flash import VllmFlashAttention
from vllm_dllm.errors import KernelUnavailable
from vllm_dllm.self_test.attention import AttentionShape, check_attention


def refreshing() -> HostLayout:
    """Beside drafts two refreshes of everything, then one behind a prefix, a short one, and a causal one."""
    context = [[0, 33, 38, 70]] * 3 + [[0, 0, 70, 70], [0, 0, 90, 90], [0, 9, 9, 9], [0, 0, 0, 0], [0, 0, 0, 0]]
    is_causal = np.arange(8) == 7
    return host_layout(ints(3, 1, 1, 1, 1, 1), ints(5, 5, 5, 70, 90, 80, 9, 64), np.array(context), is_causal)


def test_long_requests_without_context_are_found() -> None:
    assert context_free(refreshing()).tolist() == [False, True, True, False, False, True]
    assert context_free(storing(ints(0, 0), ints(63, 64))).tolist() == [False, True]
    assert not context_free(denoising(3)).any()
    no_context = np.zeros((4, 4), dtype=np.int64)
    halves = host_layout(ints(2, 2), ints(40, 40, 40, 40), no_context, np.array([False, True, True, True]))
    assert context_free(halves).tolist() == [False, True]


def test_neighbours_are_one_call() -> None:
    layout = make_scene(refreshing()).layout
    runs = context_free_runs(layout, context_free(layout.host))
    assert [(run.rows, run.lengths["causal"]) for run in runs] == [(slice(15, 175), False), (slice(264, 328), True)]
    assert runs[0].lengths["cu_seqlens_q"].tolist() == [0, 70, 160]
    assert (runs[0].lengths["max_seqlen_q"], runs[0].lengths["max_seqlen_k"]) == (90, 90)


@pytest.fixture
def csrc(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention is there, on the CPU."""
    for name, module in stand_ins.vllm_modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(varlen, "refusal", lambda setting: None)


@pytest.mark.usefixtures("csrc")
@pytest.mark.parametrize("host", [refreshing(), storing(ints(0, 0), ints(121, 80)), mixed(), causal(5)])
def test_the_kernel_and_flash_attention_share_a_forward(host: HostLayout) -> None:
    scene = make_scene(host)
    assert_near(scene.attend(CsrcAttention), scene)


@pytest.mark.usefixtures("csrc")
def test_the_kernel_has_no_tiles_of_what_flash_attention_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = make_scene(refreshing())
    attention = CsrcAttention(scene.heads, scene.kv_cache)
    plan = attention.plan(scene.layout)
    assert len(plan.runs) == 2
    assert plan.tiles[:, 0].tolist() == [0, 3, 3, 3, 4]
    every = query_tiles(scene.layout.host, 2)
    assert torch.equal(plan.tiles, torch.from_numpy(every[np.isin(every[:, 0], [0, 3, 4])]))
    alone = make_scene(storing(ints(0, 0), ints(121, 80)))
    monkeypatch.setattr(CsrcPlan, "_run_kernel", lambda *_: pytest.fail("there is nothing for it"))
    assert_near(alone.attend(CsrcAttention), alone)


@pytest.mark.usefixtures("csrc")
def test_parts_of_few_rows_have_room_for_the_rows_of_flash_attention_too() -> None:
    heads = Heads(32, 32, 128, 0.1, torch.bfloat16)
    attention = CsrcAttention(heads, torch.zeros(1, 32, 16, 256, dtype=torch.bfloat16))
    attention.num_multiprocessors = 132
    context = np.array([[0, 0, 4096, 4096], [0, 4096, 4128, 4128]])
    host = host_layout(ints(1, 1), ints(4096, 32), context)
    layout = forward_layout(host, torch.zeros(2, 300, dtype=torch.int32), 16, 1)
    plan = attention.plan(replace(layout, max_span=host.span))
    assert [run.rows for run in plan.runs] == [slice(0, 4096)]
    num_bytes = 4 * plan.num_splits * 4128 * 32 * 130
    assert plan.num_splits == 1 or num_bytes <= workspace_bytes(128, attention.num_multiprocessors)


@pytest.mark.usefixtures("csrc")
def test_a_captured_step_is_the_kernels_alone() -> None:
    """Its padding is a long request without context in this step, and maybe not in the next one."""
    scene = make_scene(denoising(1, 4))
    layout = captured(scene, num_rows=4 * 40, block_length=4, max_num_requests=7).layout
    assert context_free(layout.host).any()
    assert CsrcAttention(scene.heads, scene.kv_cache).plan(layout).runs == ()


def library(monkeypatch: pytest.MonkeyPatch, of_vllm: int | None, reason: str | None = None) -> None:
    """Let vLLM choose a version, and say why version 2 does not work."""
    modules = stand_ins.vllm_modules()
    vars(modules["vllm.v1.attention.backends.fa_utils"])["get_flash_attn_version"] = lambda head_size: of_vllm
    reasons = {2: reason}
    vars(modules["vllm.vllm_flash_attn"])["fa_version_unsupported_reason"] = reasons.get
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


def test_the_version_is_one_that_takes_packed_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    heads = make_scene(mixed()).heads
    for of_vllm, ours in ((2, 2), (3, 3), (4, 2)):
        library(monkeypatch, of_vllm)
        assert VarlenAttention(heads).version == ours


def broken_import(monkeypatch: pytest.MonkeyPatch) -> str:
    """Let the library be there and not load, as one that was built for another torch."""
    broken = stand_ins.vllm_modules()["vllm.vllm_flash_attn"]

    def import_module(name: str) -> Any:
        if name == broken.__name__:
            raise ImportError("_vllm_fa2_C.abi3.so: undefined symbol: _ZN3c10")
        return sys.modules[name]

    monkeypatch.setattr(varlen, "import_module", import_module)
    return "does not load (_vllm_fa2_C.abi3.so: undefined symbol: _ZN3c10); reinstall vLLM"


def no_version(monkeypatch: pytest.MonkeyPatch) -> str:
    library(monkeypatch, None)
    return "does not work here with heads of 32 (see what vLLM logged)"


def no_fallback(monkeypatch: pytest.MonkeyPatch) -> str:
    library(monkeypatch, 4, "FA2 is unavailable due to: no such file")
    return "does not work here with heads of 32 (FA2 is unavailable due to: no such file)"


@pytest.mark.parametrize("fault", [broken_import, no_version, no_fallback])
def test_one_that_does_not_work_is_left_out_and_said(
    fault: Callable[[pytest.MonkeyPatch], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What needs it is unavailable; our own kernel serves its rows, and its self-test agrees."""
    monkeypatch.setattr(varlen, "missing", lambda: None)
    on_cpu = replace(varlen.SUPPORT, device_types={"cpu"}, dtypes={torch.float32}, least_capability=(0, 0))
    monkeypatch.setattr(varlen, "SUPPORT", on_cpu)
    said = fault(monkeypatch)
    setting = Setting("cpu", None, torch.float32, torch.float32, 32, 16)
    assert said in str(refusal(setting))
    assert VllmFlashAttention.unavailable(setting) == refusal(setting)
    with pytest.raises(KernelUnavailable, match=re.escape(said)):
        VarlenAttention(Heads(4, 2, 32, 0.1, torch.float32))
    shape = AttentionShape(4, 2, 32, torch.float32, torch.float32, page_size=16, block_length=8, max_len=4096)
    assert check_attention("csrc", CsrcAttention, shape, torch.device("cpu")).agrees


def test_where_it_is_not_asked() -> None:
    cpu = Setting("cpu", None, torch.bfloat16, torch.bfloat16, 128, None)
    assert refusal(cpu) == "it does not run on cpu"
    float32 = Setting("cuda", (9, 0), torch.float32, torch.float32, 128, None)
    assert refusal(float32) == "it does not take float32 (--dtype)"
    bfloat16 = Setting("cuda", (9, 0), torch.bfloat16, torch.bfloat16, 128, None)
    assert refusal(bfloat16) in (
        None,
        "the installed vLLM has no FlashAttention; install its CUDA build: `pip install vllm`",
    )
