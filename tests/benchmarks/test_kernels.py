"""`python -m benchmarks kernels` measures what it says, after it compared results."""

import dataclasses

import pytest
import torch

from benchmarks.__main__ import kernels
from benchmarks.kernels import attention, walk
from benchmarks.kernels.attention import AttentionProblem, AttentionShape, contestants
from benchmarks.kernels.suite import KernelBench, Sizes
from benchmarks.kernels.turns import UnequalResultsError
from benchmarks.kernels.walk import WalkProblem, decide_contestants
from vllm_dllm.errors import ConfigError
from vllm_dllm.unmask.walk import native_walk

CPU = torch.device("cpu")
TINY = Sizes(
    contexts=(32,),
    block_lengths=(4,),
    drafts=(0, 2),
    vocab_sizes=(113,),
    hidden_sizes=(32,),
    num_rows=(3,),
    requests=(2,),
    num_rounds=2,
)


@pytest.fixture(autouse=True)
def small_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """One data set suffices where nothing is timed, and vLLM is another test's."""
    monkeypatch.setattr("benchmarks.kernels.turns.COLD_BYTES", 1)
    monkeypatch.setattr(attention, "find_spec", lambda _: None)


def test_everything_is_measured():
    described: list[str] = []
    sections = list(KernelBench(TINY, CPU, described.append).sections())
    titles = [section.title.partition(" (")[0] for section in sections]
    assert titles == [
        "draft_graph_attention, float32",
        "draft_graph_attention, bfloat16",
        "vocab_stats, float32",
        "vocab_stats, bfloat16",
        "decide_walk and propose_nodes",
    ]
    assert [len(section.rows) for section in sections] == [4, 4, 1, 1, 3]
    without, with_drafts = sections[0].rows[:2]
    assert list(without)[6:] == ["x floor", "x 0 drafts", "gather + SDPA / csrc"]
    assert (without["drafts"], with_drafts["drafts"]) == (0, 2)
    assert without["x 0 drafts"].most == 1.0
    assert sections[2].rows[0]["peak, % of fp32 logits"] >= 0
    assert "attention: SDAR, context 32, B 4, 2 drafts" in described


def test_attention_that_differs_is_an_error(monkeypatch):
    class Wrong(attention.PlainAttention):
        def plan(self, layout):
            plan = super().plan(layout)
            return dataclasses.replace(plan, scale=2 * plan.scale)

    monkeypatch.setitem(attention.IMPLEMENTATIONS, "wrong", Wrong)
    problem = AttentionProblem(AttentionShape(4, 2, 32, torch.float32, 32, 4, 1, 1), CPU)
    with pytest.raises(UnequalResultsError, match="wrong and csrc differ by"):
        contestants(problem)


def test_a_walk_that_differs_is_an_error(monkeypatch):
    def never(*call):
        done = native_walk(*call)
        return dataclasses.replace(done, path=done.path - 1)

    monkeypatch.setattr(walk, "walk", never)
    with pytest.raises(UnequalResultsError, match="decide_walk: csrc and torch differ"):
        decide_contestants(WalkProblem(3, 8, has_noise=False, device=CPU))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("num_kv_heads", "block_length"), [(4, 8), (1, 33)])
def test_vllm_computes_the_same(dtype, num_kv_heads, block_length, monkeypatch):
    pytest.importorskip("vllm")
    monkeypatch.setattr(attention, "find_spec", lambda _: object())
    shape = AttentionShape(4, num_kv_heads, 64, dtype, 96, block_length, 2, 2)
    assert "vLLM" in contestants(AttentionProblem(shape, CPU))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="--device is 'cuda', this machine allows cpu, auto; choose one of these"):
        kernels(short=True, device="cuda", repeats=1, out=None)
