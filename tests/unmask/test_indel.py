"""LLaDA2.2's policy over random models == its plain statement, step by step, with drafts that come again."""

import random
from typing import Any

import pytest
import torch

from tests.draft.test_exact import VOCAB, SyntheticModel
from tests.draft.test_exact_cases import ALTERNATIVES, CHAIN
from tests.unmask.torch_policies import Own, decode, drawn, plain
from vllm_dllm.reference.indel_rule import Indel
from vllm_dllm.unmask import decide


@pytest.mark.parametrize("seed", range(4))
def test_random_models_that_move_tokens_equal_the_plain_statement(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred requests in all, of models that mask, delete and split often; every branch of the rule is taken."""
    taken = {"moved": 0, "again": 0, "last": 0}
    step = Indel.step

    def counted(self: Indel, canvas: Any, looks: Any) -> Any:
        taken["again"] += tuple(canvas) in self.seen
        after = step(self, canvas, looks)
        taken["moved"] += after.count(None) > canvas.count(None)
        taken["last"] += self.num_updates > 1 and not self.goes_on
        return after

    monkeypatch.setattr(Indel, "step", counted)
    rng = random.Random(seed)
    for number in range(3):
        model = SyntheticModel(8, 10 * seed + number, [0.3, 1.0, 3.0][number])
        model.own[:, [3, 8, 9]] += 0.7
        requests = [drawn("indel", rng) for _ in range(9)]
        expected = [plain(model, request, num_blocks=2) for request in requests]
        graph, budget = [(CHAIN, 7), (ALTERNATIVES, 5)][number % 2]
        for found in (decode(model, requests, num_blocks=2), decode(model, requests, graph, budget, num_blocks=2)):
            assert [(each.tokens, each.steps) for each in found] == expected
    assert min(taken.values()) > 10, taken
    assert all(token < VOCAB for tokens, _ in expected for token in tokens)


class Turning(SyntheticModel):
    """One that masks its first position once the others are written, so that growing canvases come again."""

    def block_logits(self, canvas: torch.Tensor) -> torch.Tensor:
        logits = torch.full((*canvas.shape, VOCAB), -5.0)
        logits += torch.arange(VOCAB) / 100
        logits[..., 5] = torch.tensor([4.0 - place for place in range(canvas.shape[1])])
        is_full = (canvas != 3).all(1)
        logits[is_full, :, 3] = 9.0
        return logits


def test_a_draft_that_comes_again_is_left_to_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its root's step did not know what would be written on the way there."""
    asked: list[bool] = []
    decidable = decide.is_decidable

    def recorded(ground: Any, node: torch.Tensor, state: Any) -> torch.Tensor:
        found = decidable(ground, node, state)
        asked.extend(found.tolist())
        return found

    monkeypatch.setattr("vllm_dllm.unmask.walk.is_decidable", recorded)
    model = Turning(4, 0, 1.0)
    request = Own("indel", (("edit_threshold", 0.0), ("post_steps", 16), ("delete", 8), ("split", 9)), threshold=0.99)
    expected = plain(model, request)
    found = decode(model, [request], CHAIN, 7)
    assert [(each.tokens, each.steps) for each in found] == [expected]
    assert found[0].accepted > 0
    assert not all(asked)
