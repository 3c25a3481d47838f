"""What `benchmarks.ends` reads off a whole reply's states."""

import torch

from benchmarks.ends import forwards
from vllm_dllm.reference.decode import Generation
from vllm_dllm.reference.ends import Ends

MASK = 3
STATES = [
    [7, MASK, MASK, MASK, MASK, MASK, MASK, MASK],
    [7, MASK, 1, MASK, MASK, MASK, MASK, MASK],
    [7, 8, 1, MASK, MASK, MASK, MASK, MASK],
    [7, 8, 1, 1, MASK, MASK, MASK, MASK],
    [7, 8, 1, 1, 1, MASK, MASK, MASK],
    [7, 8, 1, 1, 1, 1, 1, 1],
]


def test_forwards_to_the_end_of_the_reply_the_block_and_the_answer():
    history = torch.tensor(STATES)
    made = Generation(history[-1], nfe=6, nfe_refresh=2, history=history)
    assert forwards(made, MASK, Ends((1,)), 4, 4) == [6, 4, 3]
    assert forwards(made, MASK, Ends((1,)), 1, 4) == [6, 5, 3]
    assert forwards(made, MASK, Ends((9,)), 4, 4) == [6, 6, 6]
