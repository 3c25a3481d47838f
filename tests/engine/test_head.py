"""Which heads are more than a product with their weight."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from vllm_dllm.engine import head as head_module
from vllm_dllm.engine.head import choose_head
from vllm_dllm.errors import KernelUnavailable
from vllm_dllm.unmask.head import LogitsHead, MergedHead, WeightHead


def model(lm_head: dict[str, Any], processor: dict[str, Any]) -> Any:
    indices = SimpleNamespace(num_org_elements=60, num_added_elements=0, org_vocab_start_index=0)
    plain_processor = {"scale": 1.0, "soft_cap": None, "head_dtype": None}
    plain = {"quant_method": UnquantizedEmbeddingMethod(), "bias": None, "shard_indices": indices}
    weight = torch.nn.Parameter(torch.zeros(64, 8))
    return SimpleNamespace(
        lm_head=SimpleNamespace(**(plain | {"weight": weight} | lm_head)),
        logits_processor=SimpleNamespace(**(plain_processor | processor)),
        head_logits=lambda hidden: hidden,
        own_logits=lambda hidden: hidden,
    )


EXTENDED = SimpleNamespace(num_org_elements=60, num_added_elements=1, org_vocab_start_index=0)


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "get_tensor_model_parallel_world_size", lambda: 1)


def test_a_plain_head_is_reduced_from_its_weight_without_padding() -> None:
    head = choose_head(model({}, {}), 60, 3, torch.device("cpu")).own
    assert isinstance(head, WeightHead)
    assert head.weight.shape == (60, 8)


@pytest.mark.parametrize(
    ("lm_head", "processor"),
    [
        ({"quant_method": object()}, {}),
        ({"bias": torch.zeros(64)}, {}),
        ({}, {"scale": 2.0}),
        ({}, {"soft_cap": 30.0}),
        ({"shard_indices": EXTENDED}, {}),
    ],
    ids=["quantised", "bias", "scale", "cap", "extended"],
)
def test_other_heads_are_reduced_from_logits(lm_head: dict[str, Any], processor: dict[str, Any]) -> None:
    assert isinstance(choose_head(model(lm_head, processor), 60, 3, torch.device("cpu")).own, LogitsHead)


def test_without_the_op_torch_serves_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise KernelUnavailable("not built")

    warnings: list[str] = []
    monkeypatch.setattr(head_module.ops, "require", refuse)
    monkeypatch.setattr(head_module.logger, "warning", lambda text, error: warnings.append(text % error))
    head = choose_head(model({}, {}), 60, 3, torch.device("cpu")).own
    assert isinstance(head, LogitsHead)
    assert warnings == ["Row statistics are made by torch: not built"]


CUDA = torch.device("cuda")


def with_ranks(monkeypatch: pytest.MonkeyPatch, num_ranks: int) -> None:
    """Let this rank be one of several, whose ops are built for every device."""
    monkeypatch.setattr(head_module, "get_tensor_model_parallel_world_size", lambda: num_ranks)
    monkeypatch.setattr(head_module.ops, "require", lambda *_: None)


def test_each_rank_reduces_its_own_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only an extended vocabulary is gathered whole, since its parts are no ranges of ids."""
    with_ranks(monkeypatch, 2)
    for device, own in ((torch.device("cpu"), WeightHead), (CUDA, LogitsHead)):
        head = choose_head(model({}, {}), 60, 3, device).own
        assert isinstance(head, MergedHead)
        assert isinstance(head.own, own)
    logits = torch.zeros(2, 64)  # with those of the rows that pad the part
    assert head.own.head_logits(logits).shape == (2, 60)  # type: ignore[union-attr]
    quantised = choose_head(model({"quant_method": object()}, {}), 60, 3, CUDA).own
    assert isinstance(quantised, MergedHead)
    assert isinstance(choose_head(model({"shard_indices": EXTENDED}, {}), 60, 3, CUDA).own, LogitsHead)


def test_a_gpu_keeps_float32_logits_of_plain_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of quantised ones, whose product is their method's, nor where the user or batch invariance decides."""
    with_ranks(monkeypatch, 1)
    half = {"weight": torch.nn.Parameter(torch.zeros(64, 8, dtype=torch.bfloat16))}

    def head_dtype(lm_head: dict[str, Any], dtype: torch.dtype | None, device: torch.device = CUDA) -> Any:
        served = model(lm_head, {"head_dtype": dtype})
        choose_head(served, 60, 3, device)
        return served.logits_processor.head_dtype

    assert head_dtype(half, torch.bfloat16) == torch.float32
    assert head_dtype(half, None) == torch.float32
    assert head_dtype(half, torch.float16) == torch.float16
    assert head_dtype(half, torch.bfloat16, torch.device("cpu")) == torch.bfloat16
    assert head_dtype({}, torch.float32) == torch.float32
    assert head_dtype(half | {"quant_method": object()}, torch.bfloat16) == torch.bfloat16
    monkeypatch.setattr(head_module.vllm.envs, "VLLM_BATCH_INVARIANT", True, raising=False)
    assert head_dtype(half, torch.bfloat16) == torch.bfloat16
