"""Every implementation against attention written from the rule, with poison wherever nothing may be read.

The libraries have stand-ins here, so that what we ask of them is what is tested; `gpu` runs the real ones.
"""

import dataclasses
import sys
from typing import Any

import pytest
import torch

from tests.attention import stand_ins
from tests.attention.scenes import LAYOUTS, assert_near, captured, denoising, make_scene, mixed
from vllm_dllm.attention import plain, xformers
from vllm_dllm.attention.choose import IMPLEMENTATIONS
from vllm_dllm.attention.csrc import CsrcAttention
from vllm_dllm.attention.flashinfer import FlashInferAttention
from vllm_dllm.attention.interface import Attention, Setting
from vllm_dllm.attention.layout import PagedIndex
from vllm_dllm.attention.plain import PlainAttention
from vllm_dllm.attention.store import store_kv
from vllm_dllm.attention.vllm_flash import VllmFlashAttention
from vllm_dllm.attention.xformers import XformersAttention

LIBRARIES = ["flashinfer", "xformers.ops.fmha"]


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[Attention]:
    """Each implementation; of a library, its stand-in."""
    monkeypatch.setitem(sys.modules, "flashinfer", stand_ins.flashinfer())
    monkeypatch.setitem(sys.modules, "xformers.ops.fmha", stand_ins.xformers_fmha())
    for name, module in stand_ins.vllm_modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    return IMPLEMENTATIONS[request.param]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_see_their_context_and_their_node(implementation: type[Attention], layout: str) -> None:
    scene = make_scene(LAYOUTS[layout])
    assert_near(scene.attend(implementation), scene)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(3, 3), (6, 2), (5, 1)])
@pytest.mark.parametrize("is_position_major", [False, True])
def test_any_heads_and_strides_of_the_cache(
    implementation: type[Attention], num_heads: int, num_kv_heads: int, is_position_major: bool
) -> None:
    scene = make_scene(mixed(), num_heads=num_heads, num_kv_heads=num_kv_heads, is_position_major=is_position_major)
    assert_near(scene.attend(implementation), scene)


def test_a_padded_step_is_the_step(implementation: type[Attention]) -> None:
    scene = make_scene(denoising(3, 4))
    padded = captured(scene, num_rows=4 * 20, block_length=4, max_num_requests=7)
    out = padded.attend(implementation)
    assert_near(out, padded)
    assert_near(out[: len(scene.query)], scene)


@pytest.mark.parametrize("chunk_bytes", [1, 3 * 2 * 2 * 32 * 4 * 60])
def test_chunks_change_nothing(
    implementation: type[Attention], chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(xformers, "CHUNK_BYTES", chunk_bytes)
    for host in (mixed(), denoising(3)):
        scene = make_scene(host)
        assert_near(scene.attend(implementation), scene)


@pytest.mark.parametrize("implementation", [CsrcAttention])
def test_a_captured_layout_is_read_where_it_was(implementation: type[Attention]) -> None:
    """A graph keeps addresses and shapes alone: a plan of the capture serves later steps."""
    first = make_scene(denoising(1, 4))
    later = make_scene(denoising(2, 4))
    buffers = captured(first, num_rows=48, block_length=4, max_num_requests=5)
    assert implementation.support.cuda_graphs
    plan = implementation(first.heads, first.kv_cache).plan(buffers.layout)
    again = captured(later, num_rows=48, block_length=4, max_num_requests=5)
    for name in ("page_table", "first_node", "first_row", "context", "is_causal"):
        old, new = getattr(buffers.layout, name), getattr(again.layout, name)
        assert old.shape == new.shape
        old.copy_(new)
    out = torch.full_like(again.query, torch.nan)
    plan.run(again.query, again.key, again.value, again.kv_cache, out)
    assert_near(out, again)


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("implementation", [i for i in IMPLEMENTATIONS.values() if i.support.casts_cache])
def test_a_cache_of_another_dtype(
    implementation: type[Attention], cache_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "xformers.ops.fmha", stand_ins.xformers_fmha())
    scene = make_scene(mixed())
    scene = dataclasses.replace(scene, kv_cache=scene.kv_cache.to(cache_dtype))
    assert_near(scene.attend(implementation), scene)


def test_store_writes_each_place_and_no_other() -> None:
    cache = torch.zeros(4, 2, 16, 8, dtype=torch.bfloat16)
    index = PagedIndex(torch.tensor([3, 1, 3]), torch.tensor([15, 0, 2]))
    key, value = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    store_kv(key, value, cache, index)
    for i in range(3):
        stored = cache[index.page[i], :, index.offset[i]]
        assert torch.equal(stored, torch.cat([key[i], value[i]], -1).bfloat16())
    assert int((cache != 0).any(-1).sum()) == 3 * 2


def test_flashinfer_is_given_places_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of one position, those of a request's nodes once, in the order of the context."""
    monkeypatch.setitem(sys.modules, "flashinfer", stand_ins.flashinfer())
    scene = make_scene(denoising(3, 4), num_kv_heads=2)
    attention = FlashInferAttention(scene.heads, scene.kv_cache)
    attention.plan(scene.layout)
    wrapper: Any = attention.context
    assert wrapper.qo == [0, 12, 24, 36, 48]
    assert wrapper.kv == [0, 2, 2 + 66, 2 + 66 + 17, 2 + 66 + 17 + 86]
    table = scene.layout.page_table.long()
    positions = [0, 5]
    assert wrapper.indices[:2].tolist() == [int(table[0, p // 16]) * 2 * 16 + p % 16 for p in positions]


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_library_is_imported_only_when_chosen(name: str) -> None:
    assert name not in sys.modules
    setting = Setting("cuda", (9, 0), torch.bfloat16, torch.bfloat16, 128, 16)
    for implementation in (FlashInferAttention, XformersAttention):
        missing = implementation.unavailable(setting)
        assert missing is None or "is not installed; install it: `pip install" in missing
    assert name not in sys.modules


@pytest.mark.parametrize(
    ("implementation", "num_bytes"),
    [
        (CsrcAttention, 0),
        (PlainAttention, 2 * plain.CHUNK_BYTES),
        (FlashInferAttention, 5120 * 9 // 8),
        (XformersAttention, xformers.CHUNK_BYTES + 3 * 5120),
        (VllmFlashAttention, 8 * 5120),
    ],
)
def test_memory_for_a_moment_is_counted(implementation: type[Attention], num_bytes: int) -> None:
    assert implementation.temporary_bytes(torch.empty(10, 4, 32), 4096) == num_bytes


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    """The real libraries and the CUDA kernel, as far as they are installed."""
    implementation = IMPLEMENTATIONS[name]  # type: ignore[index]
    setting = Setting("cuda", torch.cuda.get_device_capability(), dtype, dtype, 32, 16)
    if (missing := implementation.unavailable(setting)) is not None:
        pytest.skip(missing)
    for host in (mixed(), denoising(3)):
        scene = make_scene(host, dtype=dtype, device="cuda")
        assert_near(scene.attend(implementation), scene)
