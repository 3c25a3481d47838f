"""Nemotron-Labs-Diffusion's configuration: Ministral's fields, YaRN and a query scale that grows with the position."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from vllm_dllm.errors import ConfigError
from vllm_dllm.models.checkpoint_config import WHERE
from vllm_dllm.models.checkpoint_fields import CheckpointFields, MaybeSize, Positive
from vllm_dllm.models.qwen_config import QwenConfig, QwenFields

_BETA = "llama_4_scaling_beta"


class NemotronFields(QwenFields):
    """Qwen's fields, with which Ministral's agree, and those of diffusion."""

    rms_norm_eps: Positive = 1e-5
    block_size: MaybeSize = None
    # How it was trained, and how the published class attends; the weights are the same.
    dlm_paradigm: Annotated[
        Literal["bidirectional", "autoregressive", "block_diff", "sbd_block_diff"] | None,
        Field(description="null, 'bidirectional', 'autoregressive', 'block_diff' and 'sbd_block_diff'"),
    ] = None


class NemotronConfig(QwenConfig):
    """Nemotron-Labs-Diffusion 3B, 8B and 14B, their Base, and models of the same layers in other sizes.

    Attributes:
        llama_4_scaling: `beta` and `original_max_position_embeddings` of the query scale, as vLLM's Mistral reads it;
            None without.
    """

    model_type = "nemotron_labs_diffusion"
    table: ClassVar[type[CheckpointFields]] = NemotronFields
    bookkeeping: ClassVar[frozenset[str]] = QwenConfig.bookkeeping | {
        *("default_generation_mode", "default_diffusion_steps", "default_diffusion_threshold"),
        *("default_diffusion_min_threshold", "default_diffusion_sampling_scaling_factor", "llama_4_scaling"),
    }
    published_mask_token_id: ClassVar[int] = 100
    published_eot_token_id: ClassVar[int] = 11
    published_vocab_sizes: ClassVar[tuple[int, ...]] = (131072,)
    tensor_names: ClassVar[Mapping[str, str]] = {
        "model.embed_tokens": "encoder.embed_tokens",
        "model.layers": "encoder.layers",
        "model.norm": "encoder.norm",
        "lm_head": "diffusion_head",
    }

    def __init__(self, **given: Any) -> None:  # transformers would put one of its own in the place of an inherited one
        super().__init__(**given)

    def resolve(self, fields: Any) -> dict[str, Any]:
        """Return the numbers that fields of the table stand for, by attribute."""
        return {**super().resolve(fields), "block_size": fields.block_size, "hidden_act": fields.hidden_act}

    def _read(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Read the query scale from the object of rotary positions, where the published files have it."""
        given, betas = dict(given), []
        for name in ("rope_scaling", "rope_parameters"):
            if isinstance(given.get(name), Mapping):
                betas += [given[name][_BETA]] if given[name].get(_BETA) is not None else []
                # Their `max_position_embeddings` says again what the field says.
                given[name] = {k: v for k, v in given[name].items() if k not in (_BETA, "max_position_embeddings")}
        if isinstance(given.get("llama_4_scaling"), Mapping):  # of a saved configuration
            betas.append(given["llama_4_scaling"].get("beta"))
        values = super()._read(given)
        for beta in betas:
            if type(beta) not in (int, float) or not 0 <= beta <= 100 or beta != betas[0]:
                raise ConfigError(
                    f"{_BETA} in {WHERE} is {beta!r}, allowed are numbers from 0 to 100, one value; correct it there"
                )
        rope, has_scale = values["rope_parameters"], bool(betas and betas[0])
        original = rope.get("original_max_position_embeddings", values["max_position_embeddings"])
        scale = {"beta": float(betas[0]), "original_max_position_embeddings": original} if has_scale else None
        return values | {"llama_4_scaling": scale}
