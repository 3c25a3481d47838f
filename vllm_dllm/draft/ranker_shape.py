"""The sizes of an order ranker (`draft.ranker`), for code without torch or without the library of its files."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

NUM_FEATURES = 10
"""What a ranker reads of each position (`draft.ranker.root_features`)."""
KERNEL = 5
"""Positions that a layer sees."""
REACH = 4
"""How far apart positions are of which a ranker says what one adds to another."""

Weights = Mapping[str, NDArray[np.float32]]
"""By name, as `weight_shapes` has them."""


def weight_shapes(width: int) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the weights of a ranker whose hidden layers are so wide."""
    layers = {"read": (NUM_FEATURES, width), "mix": (width, width), "write": (width, 1 + 2 * REACH)}
    return {f"{name}.weight": (rows, KERNEL * columns) for name, (columns, rows) in layers.items()} | {
        f"{name}.bias": (rows,) for name, (_, rows) in layers.items()
    }
