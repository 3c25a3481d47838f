"""Learn2PD (arXiv:2509.25188): a small net says of all confidences of a block which tokens are final."""

import torch
from torch import Tensor
from torch.nn.functional import linear, relu

from vllm_dllm.unmask.memory import PolicyState
from vllm_dllm.unmask.parameter import Parameter
from vllm_dllm.unmask.torch_policy import Decision, Seen, TorchPolicy


def _shapes(block_length: int) -> dict[str, tuple[int, ...]]:
    square, line = (block_length, block_length), (block_length,)
    return {"linear1.weight": square, "linear1.bias": line, "linear2.weight": square, "linear2.bias": line}


def taken_for_final(seen: Seen, is_shown: Tensor | None = None) -> Tensor:
    """Return the open positions that the net takes for final; [num_canvases, B] bool.

    Args:
        seen: canvases of a policy with the net, and a parameter `accept`.
        is_shown: [num_canvases, B] bool, of which positions the net sees the probability; None: of all.
    """
    net = seen.weights
    likeliest = 1.0 / (1.0 + seen.rows.rest.view_as(seen.canvas))  # of known positions, too
    if is_shown is not None:
        likeliest = torch.where(is_shown, likeliest, 0.0)
    hidden = relu(linear(likeliest, net["linear1.weight"], net["linear1.bias"]))
    output = torch.sigmoid(linear(hidden, net["linear2.weight"], net["linear2.bias"]))
    return seen.is_open & (output > seen.values["accept"][:, None])


def surest(seen: Seen) -> Tensor:
    """Return the surest open position of each canvas; [num_canvases, B] bool."""
    return seen.highest(seen.confidence, torch.ones_like(seen.step))


def _decide(seen: Seen, _state: PolicyState) -> Decision:
    """Unmask what the net takes for final, and the surest position."""
    return Decision(seen.unmask(surest(seen) | taken_for_final(seen)))


LEARN2PD = TorchPolicy(
    _decide,
    source="Learn2PD, arXiv:2509.25188",
    parameters={"accept": Parameter(0.96, "what the net's output has to exceed")},
    weights=_shapes,
)
