"""LLaDA2.0, 2.1 and 2.2 (inclusionAI): Bailing's layers with experts in groups, or by blocks, seen block by block.

Nothing in config.json tells 2.0 from 2.1: the layers are the same, and how a checkpoint was trained is not said there.
2.2 is told by `expert_capacity`.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from vllm_dllm.errors import ConfigError
from vllm_dllm.models.checkpoint_config import WHERE
from vllm_dllm.models.checkpoint_fields import (
    CheckpointFields,
    MaybeId,
    MaybeSize,
    Off,
    On,
    Positive,
    Size,
    Unset,
    check_token_ids,
)
from vllm_dllm.models.experts_config import EXPERTS_BOOKKEEPING
from vllm_dllm.models.qwen_config import QwenConfig, QwenFields

PUBLISHED_BLOCK = 32
"""Tokens that choose experts together, where a file with `expert_capacity` does not say."""

_Count = Annotated[int, Field(ge=0, description="whole numbers from 0 on")]


class LLaDA2Fields(QwenFields):
    """The fields of `LLaDA2MoeConfig` that change the arithmetic; what is absent is as in the published class."""

    rms_norm_eps: Positive = 1e-5
    num_experts: Size
    num_experts_per_tok: Size
    moe_intermediate_size: Size
    moe_shared_expert_intermediate_size: MaybeSize = None  # Bailing's name; the published code has none of its own
    num_shared_experts: Annotated[_Count | None, Field(description="null and whole numbers from 0 on")] = 0
    first_k_dense_replace: _Count = 0
    n_group: Size = 8
    topk_group: Size = 4
    routed_scaling_factor: Positive = 2.5
    expert_capacity: MaybeSize = None  # of LLaDA2.2: experts that the tokens of a block choose among, in no groups
    block_size: MaybeSize = None  # of these blocks
    delete_token_id: MaybeId = None
    split_token_id: MaybeId = None
    moe_router_enable_expert_bias: Annotated[
        Literal[True] | None, Field(description="null and true, as the model class always adds the bias")
    ] = None
    norm_topk_prob: Annotated[
        Literal[True] | None, Field(description="null and true, as the model class always renormalises")
    ] = None
    router_dtype: Annotated[
        Literal["fp32"] | None, Field(description="null and 'fp32', in which the model class always routes")
    ] = None
    score_function: Annotated[
        Literal["sigmoid"] | None, Field(description="null and 'sigmoid', the one implemented")
    ] = None
    norm_head: Off = None
    use_bias: Off = None
    use_qkv_bias: Off = None
    use_qk_norm: On = True
    use_rmsnorm: On = True
    image_token_offset: Unset = None  # of Uni, whose vocabulary has images
    partial_rotary_factor: Annotated[float, Field(gt=0.0, le=1.0, description="numbers above 0 and up to 1")] = 0.5
    rotary_dim: MaybeSize = None


class LLaDA2Config(QwenConfig):
    """LLaDA2.0, 2.1 and 2.2, mini and flash, CAP, DMax, and models of the same layers in other sizes."""

    model_type = "llada2_moe"
    table: ClassVar[type[CheckpointFields]] = LLaDA2Fields
    bookkeeping: ClassVar[frozenset[str]] = QwenConfig.bookkeeping | EXPERTS_BOOKKEEPING | {"output_dropout"}
    published_mask_token_id: ClassVar[int] = 156895
    published_eot_token_id: ClassVar[int | None] = 156892  # which config.json may name `pad_token_id` alone
    published_vocab_sizes: ClassVar[tuple[int, ...]] = (157184,)
    published_edit_ids: ClassVar[tuple[int, int]] = (156930, 156931)  # of LLaDA2.2: delete and split
    qk_norm: ClassVar[bool] = True
    has_experts: ClassVar[bool] = True
    has_expert_bias: ClassVar[bool] = True
    fuses_qkv: ClassVar[bool] = True
    tensor_names: ClassVar[Mapping[str, str]] = {
        "model.embed_tokens": "model.word_embeddings",
        "self_attn.qkv_proj": "attention.query_key_value",
        "self_attn.o_proj": "attention.dense",
        "self_attn.q_norm": "attention.query_layernorm",
        "self_attn.k_norm": "attention.key_layernorm",
    }

    def __init__(self, **given: Any) -> None:  # transformers would put one of its own in the place of an inherited one
        super().__init__(**given)

    def resolve(self, fields: Any) -> dict[str, Any]:
        """Return the numbers that fields of the table stand for, by attribute."""
        if fields.expert_capacity is None:
            _check_groups(fields)
        else:
            _check_capacity(fields)
        names = ["hidden_act", "num_experts", "num_experts_per_tok", "moe_intermediate_size", "num_shared_experts"]
        names += ["first_k_dense_replace", "n_group", "topk_group", "routed_scaling_factor", "expert_capacity"]
        names += ["moe_shared_expert_intermediate_size"]
        own = {name: getattr(fields, name) for name in names}
        own["block_size"] = fields.block_size or (None if fields.expert_capacity is None else PUBLISHED_BLOCK)
        return {**super().resolve(fields), **own, **self._edit_ids(fields)}

    def _edit_ids(self, fields: Any) -> dict[str, int | None]:
        """Return the ids of the tokens that delete and split, both or none, checked."""
        names = ("delete_token_id", "split_token_id")
        ids = {name: getattr(fields, name) for name in names}
        is_published = fields.expert_capacity is not None and fields.vocab_size in self.published_vocab_sizes
        if is_published and not any(name in fields.model_fields_set for name in names):
            return dict(zip(names, self.published_edit_ids, strict=True))
        check_token_ids(ids, fields.vocab_size, WHERE)
        given = [value for value in ids.values() if value is not None]
        if len(given) == 1 or len({*given, fields.mask_token_id}) != len(given) + 1:
            raise ConfigError(
                f"delete_token_id and split_token_id in {WHERE} are {ids['delete_token_id']} and "
                f"{ids['split_token_id']}, mask_token_id is {fields.mask_token_id}; allowed are three different ids, "
                "or null for both; correct them"
            )
        return ids

    @property
    def edit_ids(self) -> tuple[int, int] | None:
        """The tokens that delete and split of LLaDA2.2, by which it is decoded; None: it has none."""
        if self.expert_capacity is None or self.delete_token_id is None:
            return None
        return self.delete_token_id, self.split_token_id

    @property
    def num_dense_layers(self) -> int:
        """Layers at the start that have no experts."""
        return int(self.first_k_dense_replace)

    @property
    def shared_expert_intermediate_size(self) -> int:
        """Elements of the inner layer that all tokens have, besides their experts."""
        inner = self.moe_shared_expert_intermediate_size or self.moe_intermediate_size
        return int(inner * (self.num_shared_experts or 0))

    @classmethod
    def rotated_part(cls, fields: Any, head_dim: int) -> int:
        """Return how many elements of a head are rotated, the first ones."""
        part = int(head_dim * fields.partial_rotary_factor)
        if part < 2 or part % 2:
            raise ConfigError(
                f"partial_rotary_factor in {WHERE} is {fields.partial_rotary_factor}, which rotates {part} of the "
                f"{head_dim} elements of a head, but they are rotated in pairs; allowed are even numbers from 2 on; "
                "correct partial_rotary_factor or head_dim"
            )
        if fields.rotary_dim not in (None, part):
            raise ConfigError(
                f"rotary_dim in {WHERE} is {fields.rotary_dim}, but partial_rotary_factor rotates {part} elements of "
                f"a head; allowed are null and {part}; correct one of them"
            )
        return part


def _check_capacity(fields: Any) -> None:
    """Check that a token finds enough experts among those of its block. Raises: ConfigError."""
    if not fields.num_experts_per_tok <= fields.expert_capacity <= fields.num_experts:
        raise ConfigError(
            f"expert_capacity in {WHERE} is {fields.expert_capacity}, but a token has {fields.num_experts_per_tok} of "
            f"{fields.num_experts} experts; allowed are numbers from num_experts_per_tok to num_experts; correct one "
            "of them"
        )


def _check_groups(fields: Any) -> None:
    """Check that experts fall into groups and a token finds enough in its own. Raises: ConfigError."""
    num, groups, kept = fields.num_experts, fields.n_group, fields.topk_group
    if num % groups or num // groups < 2:
        raise ConfigError(
            f"n_group in {WHERE} is {groups}, but num_experts is {num}, and a group is scored by two of its experts; "
            "allowed are divisors with at least two experts in each group; correct one of them"
        )
    if kept > groups:
        raise ConfigError(
            f"topk_group in {WHERE} is {kept}, but n_group is {groups}; allowed are numbers up to it; correct one of "
            "them"
        )
    if fields.num_experts_per_tok > kept * (num // groups):
        raise ConfigError(
            f"num_experts_per_tok in {WHERE} is {fields.num_experts_per_tok}, but the {kept} groups of topk_group have "
            f"{kept * (num // groups)} experts; allowed are numbers up to it; correct one of them"
        )
