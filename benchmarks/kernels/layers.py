"""The forward of an 8B-shaped stack of layers by its number of rows, on a GPU: where more rows begin to cost."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, silu

from benchmarks.kernels.attention import AttentionProblem, AttentionShape, plans
from benchmarks.kernels.floor import Rates
from benchmarks.kernels.turns import Contestant
from vllm_dllm.attention.csrc import CsrcAttention

HIDDEN_SIZE, NUM_HEADS, MLP_SIZE, NUM_LAYERS = 4096, 32, 12288, 32  # LLaDA-8B
CONTEXT_LEN = 1024
BLOCK_LENGTH = 32

_LAYER_WEIGHTS = 4 * HIDDEN_SIZE**2 + 3 * HIDDEN_SIZE * MLP_SIZE


@dataclass(frozen=True, slots=True)
class LayerStack:
    """Layers of random weights in bfloat16; without rotary embedding, which costs next to nothing."""

    qkv: Tensor  # [num_layers, 3 * hidden_size, hidden_size]
    out: Tensor  # [num_layers, hidden_size, hidden_size]
    gate_up: Tensor  # [num_layers, 2 * mlp_size, hidden_size]
    down: Tensor  # [num_layers, hidden_size, mlp_size]

    @classmethod
    def random(cls, device: torch.device) -> "LayerStack":
        """Make as many layers as LLaDA-8B has, or as half of the free memory takes."""
        free_bytes, _ = torch.cuda.mem_get_info(device)
        num_layers = max(1, min(NUM_LAYERS, free_bytes // 2 // (2 * _LAYER_WEIGHTS)))

        def weight(num_out: int, num_in: int) -> Tensor:
            values = torch.empty(num_layers, num_out, num_in, dtype=torch.bfloat16, device=device)
            return values.normal_(std=num_in**-0.5)

        return cls(
            qkv=weight(3 * HIDDEN_SIZE, HIDDEN_SIZE),
            out=weight(HIDDEN_SIZE, HIDDEN_SIZE),
            gate_up=weight(2 * MLP_SIZE, HIDDEN_SIZE),
            down=weight(HIDDEN_SIZE, MLP_SIZE),
        )

    @property
    def num_layers(self) -> int:
        """Layers."""
        return len(self.qkv)

    def contestant(self, num_rows: int) -> Contestant:
        """Return the forward of one request's block and its drafts, `num_rows` in all, a multiple of BLOCK_LENGTH."""
        problem = AttentionProblem(_shape(num_rows), self.qkv.device)
        prepared = plans(problem, CsrcAttention)
        hidden = torch.randn(num_rows, HIDDEN_SIZE, dtype=torch.bfloat16, device=self.qkv.device)
        attended = torch.empty_like(problem.query)

        def attend(layer: int, rows: Tensor) -> Tensor:
            query, key, value = rows.view(num_rows, 3, NUM_HEADS, -1).unbind(1)
            prepared[layer % problem.num_sets].run(query, key, value, problem.kv_cache, attended)
            return attended.flatten(1)

        def forward(_: int) -> Tensor:
            rows = hidden
            for layer in range(self.num_layers):
                rows = self._layer(layer, rows, attend)
            return rows

        return forward

    def floor_ms(self, num_rows: int, rates: Rates) -> float:
        """Return the time that reading weights and context once, or the products, takes at best."""
        shape = _shape(num_rows)
        num_seen = num_rows * (CONTEXT_LEN + BLOCK_LENGTH)
        num_flops = 2.0 * num_rows * _LAYER_WEIGHTS + 4.0 * HIDDEN_SIZE * num_seen
        return self.num_layers * rates.floor_ms(2 * _LAYER_WEIGHTS + shape.context_bytes, num_flops)

    def _layer(self, layer: int, rows: Tensor, attend: Callable[[int, Tensor], Tensor]) -> Tensor:
        normed = rms_norm(rows, (HIDDEN_SIZE,))
        rows = rows + linear(attend(layer, linear(normed, self.qkv[layer])), self.out[layer])
        gate, up = linear(rms_norm(rows, (HIDDEN_SIZE,)), self.gate_up[layer]).chunk(2, dim=-1)
        return rows + linear(silu(gate) * up, self.down[layer])


def _shape(num_rows: int) -> AttentionShape:
    return AttentionShape(
        num_heads=NUM_HEADS,
        num_kv_heads=NUM_HEADS,
        head_dim=HIDDEN_SIZE // NUM_HEADS,
        dtype=torch.bfloat16,
        context_len=CONTEXT_LEN,
        block_length=BLOCK_LENGTH,
        num_drafts=num_rows // BLOCK_LENGTH - 1,
        num_requests=1,
    )
