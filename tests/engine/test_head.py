"""Which heads are more than a product with their weight."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from vllm_dllm.engine import head as head_module
from vllm_dllm.engine.head import choose_head
from vllm_dllm.errors import KernelUnavailable
from vllm_dllm.unmask.head import LogitsHead, WeightHead


def model(lm_head: dict[str, Any], processor: dict[str, Any]) -> Any:
    indices = SimpleNamespace(num_org_elements=60, num_added_elements=0, org_vocab_start_index=0)
    plain = {"quant_method": UnquantizedEmbeddingMethod(), "bias": None, "shard_indices": indices}
    weight = torch.nn.Parameter(torch.zeros(64, 8))
    return SimpleNamespace(
        lm_head=SimpleNamespace(**(plain | {"weight": weight} | lm_head)),
        logits_processor=SimpleNamespace(**({"scale": 1.0, "soft_cap": None} | processor)),
        head_logits=lambda hidden: hidden,
    )


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "get_tensor_model_parallel_world_size", lambda: 1)


def test_a_plain_head_is_reduced_from_its_weight_without_padding() -> None:
    head = choose_head(model({}, {}), 60, 3, torch.device("cpu"))
    assert isinstance(head, WeightHead)
    assert head._shard.weight.shape == (60, 8)


@pytest.mark.parametrize(
    ("lm_head", "processor"),
    [
        ({"quant_method": object()}, {}),
        ({"bias": torch.zeros(64)}, {}),
        ({}, {"scale": 2.0}),
        ({}, {"soft_cap": 30.0}),
        ({"shard_indices": SimpleNamespace(num_added_elements=1)}, {}),
    ],
    ids=["quantised", "bias", "scale", "cap", "extended"],
)
def test_other_heads_are_reduced_from_logits(lm_head: dict[str, Any], processor: dict[str, Any]) -> None:
    assert isinstance(choose_head(model(lm_head, processor), 60, 3, torch.device("cpu")), LogitsHead)


def test_without_the_op_torch_serves_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise KernelUnavailable("not built")

    warnings: list[str] = []
    monkeypatch.setattr(head_module.ops, "require", refuse)
    monkeypatch.setattr(head_module.logger, "warning", lambda text, error: warnings.append(text % error))
    head = choose_head(model({}, {}), 60, 3, torch.device("cpu"))
    assert isinstance(head, LogitsHead)
    assert warnings == ["Row statistics are made by torch: not built"]
