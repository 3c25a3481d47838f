"""How much work the engine did, counted on the host."""

from dataclasses import dataclass


@dataclass(slots=True)
class Counters:
    """Forwards that requests took part in, each counted once per request (NFE)."""

    nfe_denoise: int = 0
    nfe_refresh: int = 0

    def record_step(self, num_reqs: int) -> None:
        """Count a denoising forward of `num_reqs` requests."""
        self.nfe_denoise += num_reqs

    def record_refresh(self, num_reqs: int) -> None:
        """Count a refresh of `num_reqs` requests."""
        self.nfe_refresh += num_reqs
