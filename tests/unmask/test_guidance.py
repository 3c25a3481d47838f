"""Classifier-free guidance of rows: what is combined, with what, and that nobody else's rows change."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from vllm_dllm.ops.vocab_stats import RowIds
from vllm_dllm.state.guidance import GuidanceState
from vllm_dllm.unmask.guidance import Guidance, wanted_logits
from vllm_dllm.unmask.head import EditedHead, LogitsHead
from vllm_dllm.unmask.logprobs import LogprobHead
from vllm_dllm.unmask.walk import Nodes

VOCAB, WIDTH, MASK = 23, 8, 3
WEIGHT = torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(1))


def head_logits(hidden: Tensor) -> Tensor:
    return hidden @ WEIGHT.T


def rows(count: int, seed: int) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def test_guided_rows_are_combined_before_they_are_edited() -> None:
    hidden, twins = rows(4, 2), rows(4, 3)
    scale = torch.tensor([0.0, 0.5, 2.0, 0.0])
    edits = SimpleNamespace(apply=lambda logits: logits.clamp(max=0.25))
    found = wanted_logits(head_logits, hidden, RowIds(edits=edits, guidance=Guidance(scale, twins)))  # type: ignore[arg-type]
    for row in range(4):
        own, other = WEIGHT @ hidden[row], WEIGHT @ twins[row]
        expected = own if scale[row] == 0 else other + (float(scale[row]) + 1) * (own - other)
        assert torch.allclose(found[row], expected.clamp(max=0.25), atol=1e-5)


@pytest.mark.parametrize("chunk_rows", [1, 3, 64])
def test_statistics_and_log_probabilities_are_of_guided_logits(chunk_rows: int) -> None:
    """Whoever is not guided has the same bits as alone."""
    hidden, twins, scale = rows(6, 4), rows(6, 5), torch.tensor([0.0, 1.5, 0.0, 0.3, 0.0, 4.0])
    own = LogitsHead(head_logits, VOCAB, MASK, is_native=False)
    head = EditedHead(own, head_logits, VOCAB, MASK, is_native=False)
    head._whole.chunk_rows = chunk_rows
    ids = RowIds(guidance=Guidance(scale, twins))
    stats, plain = head(hidden, None, 4, ids), head(hidden, None, 4)
    guided = head_logits(twins) + (scale[:, None] + 1) * (head_logits(hidden) - head_logits(twins))
    guided[:, MASK] = -torch.inf
    is_guided = scale > 0
    assert torch.equal(stats.token_ids[is_guided], guided.argmax(1)[is_guided])
    for one, other in zip(stats.tensors, plain.tensors, strict=True):
        assert torch.equal(one[~is_guided], other[~is_guided])
    told = LogprobHead(head_logits, VOCAB, MASK)(hidden, stats.token_ids, 2, ids)
    log_probs = torch.where(
        is_guided[:, None], guided, head_logits(hidden).index_fill(1, torch.tensor([MASK]), -torch.inf)
    )
    expected = log_probs.double().log_softmax(1).gather(1, stats.token_ids[:, None])[:, 0].float()
    assert torch.allclose(told.log_probs[:, 0], expected, atol=1e-5)


def test_a_slots_scale_is_that_of_its_request() -> None:
    state = GuidanceState(3, torch.device("cpu"))
    state.put(1, 1.5, 7)
    state.put(2, 0.5, 9)
    state.apply_staged_writes()
    assert state.prompts(np.array([0])) is None
    found = state.prompts(np.array([2, 0, 1]))
    assert found is not None
    assert found.tolist() == [9, 0, 7]
    nodes = Nodes.of_roots(torch.full((3, 2), MASK), MASK)
    hidden = torch.arange(10.0)[:, None]  # three canvases of two rows, then the twins of the last two of them
    own, guidance = state.split(torch.tensor([0, 2, 1]), nodes, hidden, torch.tensor([1, 2]))
    assert own.flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert guidance is not None
    assert guidance.scale.tolist() == [0, 0, 0.5, 0.5, 1.5, 1.5]
    assert guidance.twins.flatten().tolist() == [0, 0, 6, 7, 8, 9]
    state.put(1, 0.0, 7)
    state.apply_staged_writes()
    assert state.prompts(np.array([1])) is None
    assert (
        state.split(torch.tensor([1]), nodes.of(torch.tensor([0])), hidden[:2], torch.tensor([], dtype=torch.int64))[1]
        is None
    )
