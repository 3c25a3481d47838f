"""What a policy asks besides that writes any token: the mask's logit, and the likeliest of the tokens not written."""

import random

import pytest
import torch

from vllm_dllm.unmask.head import EditedHead, LogitsHead
from vllm_dllm.unmask.unwritten import other_tokens

MASK, VOCAB = 3, 70


@pytest.mark.parametrize("is_native", [False, True], ids=["torch", "op"])
def test_the_likeliest_token_that_was_not_written(is_native: bool) -> None:
    """Also the last of a word of bits, and where few tokens are left, or none; the mask token is told apart."""
    rng, logits = random.Random(0), torch.randn(48, VOCAB, generator=torch.Generator().manual_seed(0))
    logits[::3, MASK] += 9.0
    others = [token for token in range(VOCAB) if token != MASK]
    written = [rng.sample(range(VOCAB), rng.choice([0, 1, 5, 40])) for _ in range(46)]
    for row, own in enumerate(written):
        own += [] if row % 4 else [int(logits[row].argmax())] * (int(logits[row].argmax()) not in own)
        own += [token for token in (31, 63) if token not in own]
    written += [others, [MASK, *others[1:]]]
    width = max(map(len, written))
    given = torch.tensor([[*own, *[-1] * (width - len(own))] for own in written])
    own_head = LogitsHead(lambda hidden: hidden.clone(), VOCAB, MASK, is_native=is_native)
    head = EditedHead(own_head, lambda hidden: hidden.clone(), VOCAB, MASK, is_native=is_native)
    before = logits.clone()
    found = other_tokens(head, logits, given.to(torch.int32), MASK, VOCAB)
    assert torch.equal(logits, before)
    for row, own in enumerate(written):
        left = before[row].double()
        left[[MASK, *own]] = -torch.inf
        token = int(left.argmax()) if left.max() > -torch.inf else -1
        assert found[row].tolist() == [float(before[row, MASK]), token, float(left.max())]
    assert int(found[-2, 1]) == -1
    assert int(found[-1, 1]) == others[0]
