"""What `vllm-dllm doctor` found of one thing."""

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "missing", "broken"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        topic: what.
        text: what was found; of what is not "ok" also the command that mends it.
        level: "missing" is slower or less, "broken" means that no model can be served.
    """

    topic: str
    text: str
    level: Level = "ok"
