"""Learn2PD (arXiv:2509.25188): a small net says of all confidences of a block which tokens are final."""

import torch
from torch.nn.functional import linear, relu

from vllm_dllm.unmask.memory import PolicyState
from vllm_dllm.unmask.parameter import Parameter
from vllm_dllm.unmask.torch_policy import Decision, Seen, TorchPolicy


def _shapes(block_length: int) -> dict[str, tuple[int, ...]]:
    square, line = (block_length, block_length), (block_length,)
    return {"linear1.weight": square, "linear1.bias": line, "linear2.weight": square, "linear2.bias": line}


def _decide(seen: Seen, _state: PolicyState) -> Decision:
    """Unmask what the net takes for final, and the surest position."""
    net = seen.weights
    likeliest = 1.0 / (1.0 + seen.rows.rest.view_as(seen.canvas))  # of known positions, too
    hidden = relu(linear(likeliest, net["linear1.weight"], net["linear1.bias"]))
    is_final = (
        torch.sigmoid(linear(hidden, net["linear2.weight"], net["linear2.bias"])) > seen.values["accept"][:, None]
    )
    surest = seen.highest(seen.confidence, torch.ones_like(seen.step))
    return Decision(seen.unmask(surest | (seen.is_open & is_final)))


LEARN2PD = TorchPolicy(
    _decide,
    source="Learn2PD, arXiv:2509.25188",
    parameters={"accept": Parameter(0.96, "what the net's output has to exceed")},
    weights=_shapes,
)
