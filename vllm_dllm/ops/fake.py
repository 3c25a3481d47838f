"""The fake of each native op: its result's shape, dtype and device, for tracing."""

from collections.abc import Callable

from torch import Tensor, float64


def counter_uniform(keys: Tensor, first_id: int, num_ids: int) -> Tensor:
    """Return an empty [num_rows, num_ids] float64."""
    return keys.new_empty((keys.shape[0], num_ids), dtype=float64)


FAKES: dict[str, Callable[..., Tensor]] = {"counter_uniform": counter_uniform}
"""Every op of the library."""
