"""The settings of a server that say which K/V its steps compute anew; `config.DllmConfig` has them among its own."""

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vllm_dllm.names import KvPolicyName

# Strict, so that "0.9" or true is refused where a number is meant; a JSON integer is still a valid float.
STRICT = ConfigDict(extra="forbid", frozen=True, strict=True)

# Each type's description says what is allowed, in error messages.
Count = Annotated[int, Field(ge=1, description="whole numbers from 1 on")]
_KvPolicy = Annotated[KvPolicyName, Field(description="'dual', 'prefix', 'block_causal', 'causal' and 'window'")]


class KvSettings(BaseModel):
    """Blocks and the K/V around them; attributes as in `config.DllmConfig`."""

    model_config = STRICT

    block_length: Annotated[int, Field(ge=1, le=1024, description="whole numbers from 1 to 1024")] = 32
    kv_policy: _KvPolicy = "dual"
    refresh_every: Annotated[Count | None, Field(description="null and whole numbers from 1 on")] = None

    @property
    def is_block_causal(self) -> bool:
        """Whether stored K/V never change; a fact of the family (`models.interface.check_family`)."""
        return self.kv_policy in ("block_causal", "causal", "window")

    @property
    def has_windows(self) -> bool:
        """Whether what is denoised slides over the answer, so that requests have windows in the place of blocks."""
        return self.kv_policy == "window"

    @property
    def is_aligned(self) -> bool:
        """Whether blocks begin at multiples of their length, else behind the prompt."""
        return self.kv_policy == "block_causal"

    @model_validator(mode="after")
    def _refresh_needs_dual(self) -> Self:
        if self.refresh_every is not None and self.kv_policy != "dual":
            is_prefix = self.kv_policy == "prefix"
            reason = "recomputes what follows the block at every step" if is_prefix else "never computes K/V again"
            raise ValueError(
                f"refresh_every is {self.refresh_every} but kv_policy is {self.kv_policy!r}, which {reason}; leave "
                "refresh_every out or set kv_policy to 'dual'"
            )
        if self.refresh_every is not None and self.refresh_every > self.block_length:
            raise ValueError(
                f"refresh_every is {self.refresh_every} but a block of {self.block_length} has at most as many steps; "
                f"choose 1..{self.block_length} or leave it out"
            )
        return self
