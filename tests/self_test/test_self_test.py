"""The self-test agrees with right kernels, and sees each way in which one may be wrong."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops import simt
from vllm_dllm import ops
from vllm_dllm.attention import layout
from vllm_dllm.attention.csrc import CsrcAttention
from vllm_dllm.attention.interface import Heads
from vllm_dllm.attention.layout import ForwardLayout, forward_layout
from vllm_dllm.attention.plain import PlainAttention
from vllm_dllm.self_test import attention, decoding, isolated
from vllm_dllm.self_test.attention import AttentionShape, check_attention
from vllm_dllm.self_test.check import Check, relative_error, row_error, share_unequal, worst
from vllm_dllm.self_test.decoding import DecodingShape, check_decoding
from vllm_dllm.self_test.isolated import Request, run_isolated
from vllm_dllm.unmask.schedule import UnmaskRules

CPU = torch.device("cpu")
SHAPE = AttentionShape(4, 2, 32, torch.float32, torch.float32, page_size=16, block_length=8, max_len=4096)
DECODING = DecodingShape(500, 4, torch.bfloat16)


@pytest.mark.parametrize("implementation", [CsrcAttention, PlainAttention])
@pytest.mark.parametrize(
    "shape",
    [
        SHAPE,
        replace(SHAPE, num_heads=6, num_kv_heads=1, head_dim=64, page_size=32),
        replace(SHAPE, dtype=torch.bfloat16, kv_dtype=torch.bfloat16, block_length=4),
        replace(SHAPE, dtype=torch.float16, kv_dtype=torch.float16, max_len=256, block_length=32),
        replace(SHAPE, block_length=16, max_len=16),
    ],
    ids=str,
)
def test_right_attention_agrees(implementation: Any, shape: AttentionShape) -> None:
    check = check_attention("it", implementation, shape, CPU)
    assert check.agrees
    assert 0 < check.error <= check.allowed


class Wrong(PlainAttention):
    """Attention whose layout, scale or output a mutation changes."""

    layout: Callable[[ForwardLayout], ForwardLayout] = staticmethod(lambda layout: layout)
    scale = 1.0
    spoil: Callable[[Tensor], None] = staticmethod(lambda out: None)

    def __init__(self, heads: Heads, kv_cache: Tensor) -> None:
        super().__init__(replace(heads, scale=self.scale * heads.scale), kv_cache)

    def plan(self, layout: ForwardLayout) -> Any:
        plan, spoil = super().plan(self.layout(layout)), self.spoil

        class Plan:
            def run(self, *tensors: Tensor) -> None:
                plan.run(*tensors)
                spoil(tensors[-1])

        return Plan()


def with_context(change: Callable[[Any], Any]) -> Callable[[ForwardLayout], ForwardLayout]:
    """Change the nodes' contexts."""

    def changed(layout: ForwardLayout) -> ForwardLayout:
        host = layout.host
        context = change(host.context.copy())
        return forward_layout(replace(host, context=context), layout.page_table, layout.page_size, heads_per_kv=2)

    return changed


def with_causal(change: Callable[[Any], Any]) -> Callable[[ForwardLayout], ForwardLayout]:
    """Change which nodes' rows see each other causally."""

    def changed(layout: ForwardLayout) -> ForwardLayout:
        host = replace(layout.host, is_causal=change(layout.host.is_causal))
        return forward_layout(host, layout.page_table, layout.page_size, heads_per_kv=2)

    return changed


def with_pages(change: Callable[[Tensor], Tensor]) -> Callable[[ForwardLayout], ForwardLayout]:
    return lambda layout: replace(layout, page_table=change(layout.page_table))


def no_last_position(context: Any) -> Any:
    context[:, 1] -= (context[:, 1] > context[:, 0]).astype(context.dtype)
    return context


def block_too(context: Any) -> Any:
    context[:, 2] = context[:, 1]  # what was stored of the block, before it was denoised
    return context


MUTATIONS: dict[str, dict[str, Any]] = {
    "the last position before the block is not seen": {"layout": with_context(no_last_position)},
    "what is stored of the block is seen": {"layout": with_context(block_too)},
    "pages of another request": {"layout": with_pages(lambda table: table.roll(1, 0))},
    "pages in another order": {"layout": with_pages(lambda table: table.flip(1))},
    "another scale": {"scale": 1.02},
    "a row is not written": {"spoil": lambda out: out[-1].fill_(torch.nan)},
    "two rows change places": {"spoil": lambda out: out[-2:].copy_(out[-2:].flip(0).clone())},
    "a head is another one": {"spoil": lambda out: out[:, 0].copy_(out[:, 1])},
    "rows that come later are seen": {"layout": with_causal(lambda is_causal: 0 * is_causal)},
    "rows that come later are not seen": {"layout": with_causal(lambda is_causal: 0 * is_causal + 1)},
    "an element": {"spoil": lambda out: out[5, 1, 3].add_(0.1)},
}


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wrong_attention_does_not_agree(mutation: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, change in MUTATIONS[mutation].items():
        monkeypatch.setattr(Wrong, name, staticmethod(change) if callable(change) else change)
    shape = replace(SHAPE, dtype=dtype, kv_dtype=dtype, page_size=4)
    check = check_attention("wrong", Wrong, shape, CPU)
    assert not check.agrees, str(check)


class Remembers(CsrcAttention):
    """Reads what the layout's tensors held when it planned, as a captured graph must not."""

    field: str

    def plan(self, layout: ForwardLayout) -> Any:
        return super().plan(replace(layout, **{self.field: getattr(layout, self.field).clone()}))


@pytest.mark.parametrize("field", ["page_table", "first_node", "context", "is_causal"])
def test_a_replay_with_the_layout_of_the_capture_does_not_agree(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Remembers, "field", field, raising=False)
    assert not check_attention("it", Remembers, SHAPE, CPU).agrees


@pytest.mark.slow("kernels")
@pytest.mark.parametrize("shape", [SHAPE, replace(SHAPE, dtype=torch.bfloat16, kv_dtype=torch.bfloat16)], ids=str)
def test_the_cuda_kernel_agrees(shape: AttentionShape, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the emulator, with all that it is told on a GPU, the tiles of a captured layout among it."""
    native = simt.ops().draft_graph_attention

    def op(*tensors: Any, tiles: Tensor, num_splits: int) -> None:
        num_tiles.append(len(tiles))
        native(*tensors, None, tiles, num_splits)

    num_tiles: list[int] = []
    monkeypatch.setattr(ops, "draft_graph_attention", op)
    monkeypatch.setattr(layout, "takes_tiles", lambda device: True)
    assert check_attention("csrc", CsrcAttention, replace(shape, max_len=330), CPU).agrees
    assert min(num_tiles) > 0


def test_keys_that_are_stored_wrong_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    store = attention.store_kv
    monkeypatch.setattr(attention, "store_kv", lambda key, value, *rest: store(value, key, *rest))
    assert not check_attention("csrc", CsrcAttention, SHAPE, CPU).agrees


def test_a_step_has_all_kinds_of_segments() -> None:
    host = attention.step_layout(SHAPE)
    assert host.own_len.max() == attention.LONGEST_SEGMENT
    assert sorted(set(host.context_len.tolist())) == [0, 19, 292, 300, 2100]
    assert (host.context[:, 2] < host.context[:, 3]).any()
    assert sorted(host.own_len[host.is_causal > 0]) == [8, 8, attention.LONGEST_SEGMENT]
    assert set((host.first_node[1:] - host.first_node[:-1]).tolist()) > {1, 2}


RULES = [UnmaskRules(), UnmaskRules("timesteps", unmasks_first_alone=True, confidence="sampled")]


@pytest.mark.parametrize("rules", RULES, ids=["even", "timesteps"])
@pytest.mark.parametrize("block_length", [1, 4, 32])
def test_right_ops_agree(block_length: int, rules: UnmaskRules) -> None:
    checks = list(check_decoding(replace(DECODING, block_length=block_length, rules=rules), CPU))
    assert {check.kernel for check in checks} == set(decoding.OPS)
    assert all(check.agrees for check in checks), "; ".join(map(str, checks))


def other(tensor: Tensor) -> Tensor:
    """Change the last element that is not 0, as little as a kernel may be wrong."""
    flat = tensor.clone().flatten()
    place = int(flat.nonzero()[-1]) if flat.any() else -1
    flat[place] = ~flat[place] if flat.dtype == torch.bool else flat[place] + (1e-3 if flat.is_floating_point() else 1)
    return flat.view_as(tensor)


RESULTS = [("propose_nodes", 4), ("step_rows", 2), ("row_draws", 4), ("decide_walk", 11), ("settle_step", 4)]
"""Ops of the steps, and how many results each has that are compared always."""


@pytest.mark.parametrize(("op", "index"), [(op, index) for op, number in RESULTS for index in range(number)])
def test_a_result_that_is_wrong_is_its_ops(op: str, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(ops, op)

    def wrong(*args: Any) -> Any:
        results = list(right(*args))
        if results[index].numel():
            results[index] = other(results[index])
        return results

    monkeypatch.setattr(ops, op, wrong)
    checks = list(check_decoding(DECODING, CPU))
    assert {check.kernel for check in checks if not check.agrees} == {op}


def test_token_weights_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.propose_nodes

    def unweighed(graph: Any, weights: Any, *rest: Any) -> Any:
        return right(graph, weights[:4], *rest)

    monkeypatch.setattr(ops, "propose_nodes", unweighed)
    assert [c.kernel for c in check_decoding(DECODING, CPU) if not c.agrees] == ["propose_nodes"]


def test_what_a_step_keeps_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.settle_step

    def forgetful(nodes: Any, done: Any, requests: Any, stores: Any, *rest: Any) -> Any:
        return right(nodes, done, requests, [store.clone() for store in stores], *rest)

    monkeypatch.setattr(ops, "settle_step", forgetful)
    assert [c.kernel for c in check_decoding(DECODING, CPU) if not c.agrees] == ["settle_step"]


@pytest.mark.parametrize("field", ["top_ids", "top_logits", "rest", "weighted", "token_ids", "scores", "sampled_rest"])
def test_statistics_that_are_wrong_are_seen(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = decoding.vocab_stats

    def wrong(*args: Any, **options: Any) -> Any:
        stats = right(*args, **options)
        return replace(stats, **{field: other(getattr(stats, field) + 1)})

    monkeypatch.setattr(decoding, "vocab_stats", wrong)
    assert {c.kernel for c in check_decoding(DECODING, CPU) if not c.agrees} == {"vocab_stats"}


def test_an_op_that_is_not_built_is_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "built_ops", lambda _: ["decide_walk"])
    assert [check.kernel for check in check_decoding(DECODING, CPU)] == ["decide_walk"]


def test_errors() -> None:
    nan, inf = float("nan"), torch.inf
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert row_error(rows, rows) == 0
    assert row_error(rows + torch.tensor([[0.0, 0.5], [0.0, 0.0]]), rows) == pytest.approx(0.1)
    assert math.isnan(row_error(rows * nan, rows))
    assert share_unequal(torch.tensor([1, 2]), torch.tensor([1, 3])) == 0.5
    assert share_unequal(torch.zeros(2), torch.zeros(3)) == 1
    assert relative_error(torch.tensor([-inf, 11.0]), torch.tensor([-inf, 10.0])) == pytest.approx(0.1)
    assert math.isnan(relative_error(torch.tensor([nan]), torch.tensor([1.0])))
    assert not Check("k", "c", nan, 1.0).agrees
    found = [Check("a", "", 0.5, 1.0), Check("b", "", nan, 1.0), Check("c", "", 0.0, 0.0)]
    assert worst(found).kernel == "b"
    assert worst(found[::2]).kernel == "a"


@pytest.mark.slow("kernels")
def test_another_process_finds_the_same() -> None:
    checks = run_isolated(Request("cpu", ("csrc", SHAPE), DECODING))
    here = [each for each in isolated.run(Request("cpu", ("csrc", SHAPE), DECODING)) if isinstance(each, Check)]
    assert checks == here
    assert len(checks) >= 6


@pytest.mark.slow("kernels")
def test_a_process_that_dies_is_a_check_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "xformers/ops"
    library.mkdir(parents=True)
    (library / "fmha.py").write_text("import os\nos.kill(os.getpid(), 11)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    checks = run_isolated(Request("cpu", ("xformers", SHAPE), DECODING))
    assert [check.agrees for check in checks] == [True] * (len(checks) - 1) + [False]
    assert checks[-1].kernel == "attention xformers on cpu"
    assert "ended with SIGSEGV" in checks[-1].case
    (library / "fmha.py").write_text("raise RuntimeError('no kernel image')\n")
    (last,) = run_isolated(Request("cpu", ("xformers", SHAPE)))
    assert last.case == "ended with exit status 1: RuntimeError: no kernel image"


def test_a_process_that_does_not_end_is_a_check_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(isolated, "TIMEOUT_S", 1)
    (check,) = run_isolated(Request("cpu", ("csrc", SHAPE)))
    assert (check.case, check.agrees) == ("did not end within 1 s", False)


@pytest.mark.parametrize("written", [0, 1], ids=["token", "position"])
def test_a_row_that_is_written_wrong_is_seen(written: int, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.step_rows

    def wrong(*args: Any) -> Any:
        places = right(*args)
        args[7][written].copy_(other(args[7][written]))
        return places

    monkeypatch.setattr(ops, "step_rows", wrong)
    assert {check.kernel for check in check_decoding(DECODING, CPU) if not check.agrees} == {"step_rows"}
