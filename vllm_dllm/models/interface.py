"""The model families: what their checkpoints are called, which classes serve them, and what decoding must know.

A family is data. The loop, the state and the sampler are the same for all; where families differ, they read it here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from vllm_dllm.config import DllmConfig, InvalidOptionError
from vllm_dllm.names import BIDIRECTIONAL, KvPolicyName


@dataclass(frozen=True, slots=True)
class ModelFamily:
    """Facts of a family of checkpoints.

    Attributes:
        architecture: the name in a checkpoint's `architectures`.
        model_type: the name in a checkpoint's `model_type`, which other families may have, too.
        model_class: "module:Class" of the vLLM model.
        config_class: "module:Class" of the configuration, which has `mask_token_id`, `eot_token_id` (the token that
            ends a turn besides EOS, or None) and `block_size` where the checkpoint says it.
        generation_defaults: published defaults, by their names in a checkpoint's generation config, which may override
            them. A bidirectional model has a length: else a request that names none would fill all of `max_model_len`
            with masks.
        decoding_defaults: published values of `DllmConfig`'s fields; a checkpoint's `block_size` comes before them.
        edit_defaults: such values of checkpoints with tokens that delete and split (`edit_ids` of the configuration),
            which come before both.
        attention: `bidirectional`: every position sees the whole sequence, blocks begin behind the prompt.
            `block_causal`: a position sees its block and the blocks before it, blocks begin at multiples of their
            length, so that the first one may hold the prompt's end. `causal`: a final position sees those before it
            alone, a block that is denoised itself too; blocks begin behind the prompt, and the last one may be short.
            `window`: as `causal` of final positions, and no blocks: what is decided slides over the answer, and is
            seen in another order than that of positions (`state.sliding`).
        logit_shift: whether the row of position p predicts the token at p + 1.
        schedule: how `static` and its kin spread a block over steps: `even`, the remainder first; `timesteps`, Dream's
            schedule of times from 1 to eps.
        unmasks_first_alone: whether the first step of a block, with a cache, unmasks the block's first position alone.
            Where K/V never change this position is predicted by the row on its left, of the forward that stores it.
        sub_block_length: of parts of a block that are decided one after another; None: it has none.
        confidence: `model`: of the distribution as the model gives it. `sampled`: after temperature, top_k and top_p.
        causal_class: "module:Class" of the vLLM model that serves the same weights autoregressively, under the class's
            name as architecture (mode `ar`); None: it is trained for diffusion alone.
        draft_adapter: folder beside the weights that may have the adapter which self-speculation's drafts take.
        block_size_name: what config.json calls the block length of training.
        other_files: of files of the same class that are not served: their `model_type`, and what to do.
        remote_class: of checkpoints whose `architectures` and `model_type` are a stock model's: the class in `auto_map`
            that they are told by.
    """

    architecture: str
    model_type: str
    model_class: str
    config_class: str
    generation_defaults: Mapping[str, Any]
    decoding_defaults: Mapping[str, Any] = field(default_factory=dict)
    edit_defaults: Mapping[str, Any] = field(default_factory=dict)
    attention: Literal["bidirectional", "block_causal", "causal", "window"] = "bidirectional"
    logit_shift: bool = False
    schedule: Literal["even", "timesteps"] = "even"
    unmasks_first_alone: bool = False
    sub_block_length: int | None = None
    confidence: Literal["model", "sampled"] = "model"
    causal_class: str | None = None
    draft_adapter: str | None = None
    block_size_name: str = "block_size"
    other_files: Mapping[str, str] = field(default_factory=dict)
    remote_class: str | None = None

    @property
    def is_block_causal(self) -> bool:
        """Whether a position sees nothing behind its block, so that stored K/V never change."""
        return self.attention != "bidirectional"

    @property
    def stores_alone(self) -> bool:
        """Whether a block begins with a step that stores, whose last row decides the block's first position."""
        return self.is_block_causal and self.unmasks_first_alone

    @property
    def kv_facts(self) -> dict[str, bool]:
        """What decides which K/V its steps store, besides settings: keywords of `state.windows.make_schedule`."""
        return {"stores_alone": self.stores_alone, "logit_shift": self.logit_shift}

    @property
    def kv_policies(self) -> tuple[KvPolicyName, ...]:
        """The KV policies that its attention allows."""
        return BIDIRECTIONAL if self.attention == "bidirectional" else (self.attention,)

    def settings(self, block_size: int | None, edit_ids: tuple[int, int] | None = None) -> dict[str, Any]:
        """Return the published values of `DllmConfig`'s fields for a checkpoint that says `block_size`, and `edit_ids`.

        These are the tokens that delete and split; None: it has none.
        """
        said: dict[str, Any] = {} if block_size is None else {"block_length": block_size}
        if edit_ids is not None:
            said |= {**self.edit_defaults, "indel_delete": edit_ids[0], "indel_split": edit_ids[1]}
        return {**self.decoding_defaults, **said}


FAMILIES = (
    ModelFamily(
        architecture="LLaDAModelLM",
        model_type="llada",
        model_class="vllm_dllm.models.llada:LLaDAModelLM",
        config_class="vllm_dllm.models.llada_config:LLaDAConfig",
        generation_defaults={"temperature": 0.0, "max_new_tokens": 128},
    ),
    ModelFamily(
        architecture="DreamModel",
        model_type="Dream",
        model_class="vllm_dllm.models.transformer:MaskedDiffusionLM",
        config_class="vllm_dllm.models.dream_config:DreamConfig",
        generation_defaults={"temperature": 0.2, "top_p": 0.95, "max_new_tokens": 512},
        decoding_defaults={"policy": "entropy"},
        logit_shift=True,
        schedule="timesteps",
        unmasks_first_alone=True,
        confidence="sampled",
    ),
    ModelFamily(
        architecture="SDARForCausalLM",
        model_type="sdar",
        model_class="vllm_dllm.models.transformer:MaskedDiffusionLM",
        config_class="vllm_dllm.models.sdar_config:SDARConfig",
        generation_defaults={"temperature": 1.0},
        decoding_defaults={"block_length": 4, "kv_policy": "block_causal", "policy": "dynamic", "threshold": 0.85},
        attention="block_causal",
        confidence="sampled",
    ),
    ModelFamily(
        architecture="NemotronLabsDiffusionModel",
        model_type="nemotron_labs_diffusion",
        model_class="vllm_dllm.models.nemotron:NemotronLabsDiffusionModel",
        config_class="vllm_dllm.models.nemotron_config:NemotronConfig",
        generation_defaults={"temperature": 0.0},
        decoding_defaults={"block_length": 32, "kv_policy": "causal", "policy": "threshold", "threshold": 0.9},
        attention="causal",
        unmasks_first_alone=True,
        causal_class="vllm_dllm.models.nemotron_causal:NemotronLabsDiffusionForCausalLM",
        draft_adapter="linear_spec_lora",
    ),
    ModelFamily(
        architecture="Fast_dLLM_QwenForCausalLM",
        model_type="Fast_dLLM_Qwen",
        model_class="vllm_dllm.models.transformer:MaskedDiffusionLM",
        config_class="vllm_dllm.models.fast_dllm_config:FastDllmConfig",
        generation_defaults={"temperature": 0.0},
        decoding_defaults={"block_length": 32, "kv_policy": "block_causal", "policy": "dynamic", "threshold": 0.9},
        attention="block_causal",
        logit_shift=True,
        unmasks_first_alone=True,
        sub_block_length=8,
        confidence="sampled",
        block_size_name="bd_size",
    ),
    ModelFamily(
        architecture="WeDLMForCausalLM",
        model_type="wedlm",
        model_class="vllm_dllm.models.wedlm:WeDLMForCausalLM",
        config_class="vllm_dllm.models.wedlm_config:WeDLMConfig",
        generation_defaults={"temperature": 0.2},
        decoding_defaults={
            **{"block_length": 16, "kv_policy": "window"},
            **{"entropy_bound": 0.4, "position_penalty": 0.02},
        },
        attention="window",
    ),
    ModelFamily(
        architecture="SeedDiffcoderForCausalLM",
        model_type="llama",
        model_class="vllm_dllm.models.transformer:MaskedDiffusionLM",
        config_class="vllm_dllm.models.stable_diffcoder_config:StableDiffCoderConfig",
        generation_defaults={"temperature": 0.0},
        decoding_defaults={"block_length": 4, "kv_policy": "block_causal", "policy": "static"},
        attention="block_causal",
        remote_class="SeedDiffcoderForCausalLM",
    ),
    ModelFamily(
        architecture="LLaDAMoEModelLM",
        model_type="llada",
        model_class="vllm_dllm.models.transformer:MaskedDiffusionLM",
        config_class="vllm_dllm.models.llada_moe_config:LLaDAMoeConfig",
        generation_defaults={"temperature": 0.0, "max_new_tokens": 128},
    ),
    ModelFamily(
        architecture="SDARMoeForCausalLM",
        model_type="sdar_moe",
        model_class="vllm_dllm.models.sdar_moe:SDARMoeForCausalLM",
        config_class="vllm_dllm.models.sdar_moe_config:SDARMoeConfig",
        generation_defaults={"temperature": 1.0},
        decoding_defaults={"block_length": 4, "kv_policy": "block_causal", "policy": "dynamic", "threshold": 0.85},
        attention="block_causal",
        confidence="sampled",
    ),
    ModelFamily(
        architecture="LLaDA2MoeModelLM",
        model_type="llada2_moe",
        model_class="vllm_dllm.models.llada2:LLaDA2MoeModelLM",
        config_class="vllm_dllm.models.llada2_config:LLaDA2Config",
        generation_defaults={"temperature": 0.0, "max_new_tokens": 2048},
        decoding_defaults={"block_length": 32, "kv_policy": "block_causal", "policy": "dynamic", "threshold": 0.95},
        edit_defaults={"policy": "indel", "threshold": 0.5},  # of LLaDA2.2
        attention="block_causal",
        confidence="sampled",
        other_files={
            "llada2_moe_veomni": "split its merged experts first (dFactory's moe_convertor.py, --mode split), and "
            "correct it there"
        },
    ),
)

FAMILY_BY_ARCHITECTURE = {family.architecture: family for family in FAMILIES}


def family_of(architectures: list[str] | None) -> ModelFamily | None:
    """Return the family that serves a checkpoint, or None when it is not ours."""
    for architecture in architectures or ():
        if architecture in FAMILY_BY_ARCHITECTURE:
            return FAMILY_BY_ARCHITECTURE[architecture]
    return None


def family_said(content: Mapping[str, Any], overrides: object = None) -> ModelFamily | None:
    """Return the family that a config.json says, or None when it is not ours.

    Args:
        content: the file's.
        overrides: --hf-overrides. `architectures` in them are an answer, whatever `auto_map` says.
    """
    changes: Mapping[str, Any] = overrides if isinstance(overrides, Mapping) else {}
    said = {**content, **changes}
    architectures, auto_map = said.get("architectures"), said.get("auto_map")
    family = family_of(architectures if isinstance(architectures, list) else [])
    if family is not None or not isinstance(auto_map, Mapping) or "architectures" in changes:
        return family
    classes = {str(value).rpartition(".")[2] for value in auto_map.values()}
    return next((family for family in FAMILIES if family.remote_class in classes), None)


def config_classes() -> dict[str, str]:
    """Return what transformers' registry takes, which knows `model_type` alone: the first family's class of each.

    None for those of stock models.
    """
    own = [family for family in FAMILIES if family.remote_class is None]
    return {family.model_type: family.config_class for family in reversed(own)}


def check_family(settings: DllmConfig, family: ModelFamily) -> None:
    """Check that a server's KV policy is one for the family's attention. Raises: InvalidOptionError."""
    if settings.kv_policy in family.kv_policies:
        return
    reason = {
        "bidirectional": "sees what follows a block, so that its K/V change",
        "block_causal": "sees nothing behind a block, so that its K/V never change",
        "causal": "sees nothing behind a final position, so that its K/V never change",
        "window": "decides a window that slides over the answer, whose K/V are in flight alone",
    }[family.attention]
    allowed = " and ".join(map(repr, family.kv_policies))
    raise InvalidOptionError(
        f"additional_config.dllm.kv_policy is {settings.kv_policy!r}, but {family.architecture} {reason}; allowed are "
        f"{allowed}; leave kv_policy out",
        "additional_config.dllm.kv_policy",
        settings.kv_policy,
    )
