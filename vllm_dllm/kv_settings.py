"""The settings of a server that say which K/V its steps compute anew; `config.DllmConfig` has them among its own."""

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vllm_dllm.names import BIDIRECTIONAL, DELAYED, KvPolicyName

# Strict, so that "0.9" or true is refused where a number is meant; a JSON integer is still a valid float.
STRICT = ConfigDict(extra="forbid", frozen=True, strict=True)

# Each type's description says what is allowed, in error messages.
Count = Annotated[int, Field(ge=1, description="whole numbers from 1 on")]
_Look = Annotated[int, Field(ge=0, description="null and whole numbers from 0 on")]
_KvPolicy = Annotated[
    KvPolicyName,
    Field(
        description="'dual', 'prefix', 'freecache', 'vicinity', 'dkv', 'dkv_pd', 'block_causal', 'causal' and 'window'"
    ),
]

WINDOW_RULE = ("entropy_bound", "position_penalty")
"""The settings that decide windows which slide (`state.sliding`), in the place of a policy."""
WINDOW_SETTINGS = ("block_length", "kv_policy", *WINDOW_RULE, "attention", "mode")
"""All settings that mean something to a model with such windows."""

PREFIX_LOOK, AFTER_LOOK, WARMUP_STEPS = 16, 16, 4
"""dInfer's published values of `vicinity`."""
RELOAD_EVERY = 8
"""dKV-Cache's published `cache_reloading_step` for LLaDA."""


class KvSettings(BaseModel):
    """Blocks and the K/V around them; attributes as in `config.DllmConfig`."""

    model_config = STRICT

    block_length: Annotated[int, Field(ge=1, le=1024, description="whole numbers from 1 to 1024")] = 32
    kv_policy: _KvPolicy = "dual"
    refresh_every: Annotated[Count | None, Field(description="null and whole numbers from 1 on")] = None
    prefix_look: _Look | None = None
    after_look: _Look | None = None
    warmup_steps: _Look | None = None

    @property
    def is_block_causal(self) -> bool:
        """Whether stored K/V never change; a fact of the family (`models.interface.check_family`)."""
        return self.kv_policy not in BIDIRECTIONAL

    @property
    def has_windows(self) -> bool:
        """Whether what is denoised slides over the answer, so that requests have windows in the place of blocks."""
        return self.kv_policy == "window"

    @property
    def is_aligned(self) -> bool:
        """Whether blocks begin at multiples of their length, else behind the prompt."""
        return self.kv_policy == "block_causal"

    @property
    def unmasks_first_alone(self) -> bool:
        """Whether a block's first step unmasks its first position alone where the family asks for that.

        Fast-dLLM's caches do so under a logit shift; the others compute the row that predicts that position each step.
        """
        return self.is_block_causal or (self.kv_policy in ("dual", "prefix") and self.refresh_every != 1)

    @property
    def interval(self) -> int | None:
        """`refresh_every`, with the published value of `dkv` and `dkv_pd` where it is not given."""
        return RELOAD_EVERY if self.kv_policy in DELAYED and self.refresh_every is None else self.refresh_every

    @property
    def vicinity(self) -> tuple[int, int, int]:
        """`prefix_look`, `after_look` and `warmup_steps`, with the published values where they are not given."""
        given = (self.prefix_look, PREFIX_LOOK), (self.after_look, AFTER_LOOK), (self.warmup_steps, WARMUP_STEPS)
        before, behind, steps = (default if value is None else value for value, default in given)
        return before, behind, steps

    @model_validator(mode="after")
    def _refresh_needs_dual(self) -> Self:
        if self.refresh_every is not None and self.kv_policy not in ("dual", *DELAYED):
            reason = {
                "prefix": "recomputes what follows the block at every step",
                "freecache": "keeps what precedes the block, and recomputes the rest at every step",
                "vicinity": "computes all K/V anew when a block begins and in its warm-up steps",
            }.get(self.kv_policy, "never computes K/V again")
            raise ValueError(
                f"refresh_every is {self.refresh_every} but kv_policy is {self.kv_policy!r}, which {reason}; leave "
                "refresh_every out or set kv_policy to 'dual', 'dkv' or 'dkv_pd'"
            )
        if self.refresh_every is not None and self.refresh_every > self.block_length:
            raise ValueError(
                f"refresh_every is {self.refresh_every} but a block of {self.block_length} has at most as many steps; "
                f"choose 1..{self.block_length} or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _looks_need_vicinity(self) -> Self:
        for name in ("prefix_look", "after_look", "warmup_steps"):
            value = getattr(self, name)
            if value is not None and self.kv_policy != "vicinity":
                raise ValueError(
                    f"{name} is {value} but kv_policy is {self.kv_policy!r}, which has none; leave {name} out or set "
                    "kv_policy to 'vicinity'"
                )
        return self
