"""Order rankers that nobody trained."""

import torch

from vllm_dllm.draft.ranker import OrderRanker
from vllm_dllm.draft.ranker_shape import weight_shapes


def make_ranker(weights: str, seed: int = 0, width: int = 4) -> OrderRanker:
    """Return a ranker that nobody trained."""
    generator = torch.Generator().manual_seed(seed)

    def fill(shape: tuple[int, ...]) -> torch.Tensor:
        if weights in {"constant", "nan"}:
            return torch.full(shape, 0.5 if weights == "constant" else torch.nan)
        return torch.randn(shape, generator=generator) * (1e20 if weights == "huge" else 0.5)

    return OrderRanker.of({name: fill(shape).numpy() for name, shape in weight_shapes(width).items()})
