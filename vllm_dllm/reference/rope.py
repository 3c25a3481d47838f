"""Rotary positions in plain torch: the default, and the three ways of reaching further that are served.

Shapes: `len` positions, `dim` the size of a head. Pair i turns by its frequency f_i = theta^(-2i/dim) at each position.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Rotation = tuple[Tensor, Tensor]
"""Cosine and sine of the angles of some positions: two [len, dim] float32, the second half as the first."""


@dataclass(frozen=True, slots=True)
class Rope:
    """How positions turn the pairs of a head.

    `linear` (kaiokendev) divides positions by `factor`. `dynamic` (NTK, bloc97 and emozilla) raises theta for a
    sequence of `factor` times `max_positions`, whatever its own length: so vLLM does. `yarn` (arXiv:2309.00071) divides
    slow frequencies, keeps fast ones, and scales both query and key.

    Attributes:
        theta: the base.
        max_positions: the checkpoint's longest row; of YaRN, in training.
    """

    theta: float
    max_positions: int
    rope_type: str = "default"
    factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        """Raise ValueError for a type that is not one of the four."""
        if self.rope_type not in ("default", "linear", "dynamic", "yarn"):
            message = f"rope_type is {self.rope_type!r}; the reference has 'default', 'linear', 'dynamic' and 'yarn'"
            raise ValueError(message)

    @classmethod
    def of(cls, theta: float, scaling: Mapping[str, Any] | None, max_positions: int) -> "Rope":
        """Return what `rope_scaling` or `rope_parameters` of a config.json say; a base in them comes first."""
        given = {name: value for name, value in (scaling or {}).items() if value is not None}
        given.pop("partial_rotary_factor", None)
        kind = given.pop("type", None) or given.pop("rope_type", "default")
        given.pop("rope_type", None)
        theta = given.pop("rope_theta", theta)
        original = given.pop("original_max_position_embeddings", max_positions)
        return cls(theta=theta, max_positions=original, rope_type=kind, **given)

    def rotation(self, positions: Tensor, dim: int) -> Rotation:
        """Return the rotation of positions [len] for heads of `dim`."""
        angles = torch.outer(positions.float(), self.frequencies(dim).to(positions.device)).repeat(1, 2)
        return angles.cos() * self.amplitude, angles.sin() * self.amplitude

    def frequencies(self, dim: int) -> Tensor:
        """Return f_i, [dim / 2] float32."""
        theta, factor = self.theta, self.factor
        if self.rope_type == "dynamic":
            longest = math.floor(factor * self.max_positions)
            theta = theta * (factor * longest / self.max_positions - (factor - 1)) ** (dim / (dim - 2))
        frequencies = theta ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        if self.rope_type == "linear":
            return frequencies / factor
        if self.rope_type == "yarn":
            slowness = self._slowness(dim)
            return frequencies * (1 - slowness) + frequencies / factor * slowness
        return frequencies

    def _slowness(self, dim: int) -> Tensor:
        """Return 0 for pairs that turn `beta_fast` times in training, 1 below `beta_slow`, linear in i between."""
        first, last = (
            dim * math.log(self.max_positions / (turns * 2 * math.pi)) / (2 * math.log(self.theta))
            for turns in (self.beta_fast, self.beta_slow)
        )
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, dim - 1)
        last += 0.001 if first == last else 0
        return ((torch.arange(dim // 2, dtype=torch.float32) - first) / (last - first)).clamp(0, 1)

    @property
    def amplitude(self) -> float:
        """What query and key are multiplied by, beside the rotation."""
        if self.rope_type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        return self._temperature(self.mscale or 1.0) / (
            self._temperature(self.mscale_all_dim) if self.mscale_all_dim else 1
        )

    def _temperature(self, scale: float) -> float:
        return 0.1 * scale * math.log(self.factor) + 1.0
