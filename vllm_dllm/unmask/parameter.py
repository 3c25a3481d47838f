"""The numbers that a policy takes: what each does, its published default, and what is allowed. No torch here."""

import math
from dataclasses import dataclass
from numbers import Real

MAX_PARAMETERS = 8
"""Of a policy."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A number of a policy, which a server's settings and a request may give.

    Attributes:
        default: as published.
        says: what it does, in a few words.
        low, high: what is allowed, both included.
        is_whole: whether fractions are refused.
    """

    default: float
    says: str
    low: float = 0.0
    high: float = 1.0
    is_whole: bool = False

    @property
    def allowed(self) -> str:
        """What is allowed, for messages."""
        kind = "whole numbers" if self.is_whole else "numbers"
        if math.isinf(self.high):
            return f"finite {kind} from {self.low:g} on"
        return f"{kind} from {self.low:g} to {self.high:g}"

    def check(self, value: object) -> float:
        """Return the value as a number. Raises: ValueError where it is not allowed."""
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
        is_fraction = self.is_whole and not number.is_integer()
        if is_fraction or not (math.isfinite(number) and self.low <= number <= self.high):
            raise ValueError(f"allowed are {self.allowed}")
        return number
