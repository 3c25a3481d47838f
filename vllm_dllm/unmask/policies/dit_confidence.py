"""The learned unmasking policy (arXiv:2512.09106): a transformer of one block draws which positions are unmasked.

The tensors have the names and shapes of a checkpoint that apple/ml-rl-dllm's training writes with `policy_type:
dit_confidence` and its published sizes.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, silu

from vllm_dllm.unmask.memory import PolicyState, StateField
from vllm_dllm.unmask.parameter import Parameter
from vllm_dllm.unmask.torch_policy import Decision, Seen, TorchPolicy

WIDTH, FEED_FORWARD, NUM_HEADS = 128, 512, 2
_HEAD = WIDTH // NUM_HEADS
_PREFIX, _BLOCK = "base_policy.", "transformer_blocks.0."
_LAYERS = {  # name -> rows and columns
    "time_mlp.0": (WIDTH, WIDTH),
    "time_mlp.2": (WIDTH, WIDTH),
    "confidence_proj": (WIDTH, 1),
    **{f"{_BLOCK}{name}_proj": (WIDTH, WIDTH) for name in ("q", "k", "v", "out")},
    f"{_BLOCK}linear1": (FEED_FORWARD, WIDTH),
    f"{_BLOCK}linear2": (WIDTH, FEED_FORWARD),
    f"{_BLOCK}ada_conditioning": (6 * WIDTH, WIDTH),
    "output_proj": (1, WIDTH),
}
_NORMS = (f"{_BLOCK}norm1", f"{_BLOCK}norm2", "final_norm")


def shapes(_block_length: int = 0) -> dict[str, tuple[int, ...]]:
    """Return the tensors of the net, which are the same for every block length."""
    layers = {f"{_PREFIX}{name}.weight": shape for name, shape in _LAYERS.items()}
    biases = {f"{_PREFIX}{name}.bias": shape[:1] for name, shape in _LAYERS.items()}
    norms = {f"{_PREFIX}{name}.{part}": (WIDTH,) for name in _NORMS for part in ("weight", "bias")}
    others = {"mask_embedding.weight": (2, WIDTH), f"{_BLOCK}inv_freq": (_HEAD // 2,)}
    return layers | biases | norms | {_PREFIX + name: shape for name, shape in others.items()}


class _Net:
    """The net with its weights, by the names without prefix."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._weights = weights

    def __call__(self, is_masked: Tensor, probability: Tensor, time: Tensor) -> Tensor:
        """Return the logit of each position to be unmasked; [num_canvases, length].

        Args:
            is_masked: [num_canvases, length] bool.
            probability: [num_canvases, length] float64, of the likeliest token of each position.
            time: [num_canvases] float64, 0 to 1.
        """
        # All frequencies of the embedding of time are 1, and it is rounded to bfloat16, as published.
        embedded = torch.stack([time.cos(), time.sin()], 1).bfloat16().double().repeat_interleave(WIDTH // 2, 1)
        about_time = self._layer("time_mlp.2", silu(self._layer("time_mlp.0", embedded)))
        about = self._of("mask_embedding.weight")[is_masked.long()] + about_time[:, None]
        scale1, shift1, gate1, scale2, shift2, gate2 = self._layer(f"{_BLOCK}ada_conditioning", about).chunk(6, -1)
        x = self._layer("confidence_proj", probability[..., None])
        seen = self._attention(self._norm(f"{_BLOCK}norm1", x) * (1 + scale1) + shift1)
        x = x + seen * (1 + gate1)
        inner = self._layer(f"{_BLOCK}linear1", self._norm(f"{_BLOCK}norm2", x) * (1 + scale2) + shift2)
        x = x + self._layer(f"{_BLOCK}linear2", gelu(inner)) * (1 + gate2)
        return self._layer("output_proj", self._norm("final_norm", x))[..., 0]

    def _attention(self, x: Tensor) -> Tensor:
        """Let all positions see each other; [num_canvases, length, WIDTH] to the same."""
        heads = (*x.shape[:2], NUM_HEADS, _HEAD)
        q, k, v = (self._layer(f"{_BLOCK}{name}_proj", x).view(heads).transpose(1, 2) for name in "qkv")
        angle = torch.arange(x.shape[1], device=x.device)[:, None] * self._of(f"{_BLOCK}inv_freq")
        weight = (_rotated(q, angle) @ _rotated(k, angle).transpose(2, 3) / _HEAD**0.5).softmax(-1)
        return self._layer(f"{_BLOCK}out_proj", (weight @ v).transpose(1, 2).flatten(2))

    def _of(self, name: str) -> Tensor:
        return self._weights[_PREFIX + name]

    def _layer(self, name: str, x: Tensor) -> Tensor:
        return linear(x, self._of(f"{name}.weight"), self._of(f"{name}.bias"))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return layer_norm(x, (WIDTH,), self._of(f"{name}.weight"), self._of(f"{name}.bias"))


def _rotated(x: Tensor, angle: Tensor) -> Tensor:
    """Rotate neighbouring numbers; as published, the first ones of all pairs come out before the second ones."""
    first, second = x[..., ::2], x[..., 1::2]
    return torch.cat([first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos()], -1)


def _decide(seen: Seen, state: PolicyState) -> Decision:
    """Unmask each open position with the probability that the net says, or the likeliest where none is drawn."""
    own, taken = seen.params.own, state["taken"]
    assert own is not None, "these canvases have such a policy"
    time = taken[:, 0, 0].double() / (own.seq_len - own.prompt_len).double()
    likeliest = 1.0 / (1.0 + seen.rows.rest.view_as(seen.canvas))  # of known positions, too
    logit = _Net(seen.weights)(seen.is_masked, likeliest, time) / seen.values["temperature"][:, None]
    drawn = seen.is_open & (seen.uniform < torch.sigmoid(logit))
    one = seen.highest(logit, torch.ones_like(seen.step))
    return Decision(seen.unmask(torch.where(drawn.any(1, keepdim=True), drawn, one)), {"taken": taken + 1})


DIT_CONFIDENCE = TorchPolicy(
    _decide,
    source="learned unmasking, arXiv:2512.09106",
    parameters={"temperature": Parameter(1.0, "what the net's logits are divided by", low=0.01, high=100.0)},
    state={"taken": StateField(1, torch.int64, 0, "request")},  # steps of the reply so far
    weights=shapes,
)
