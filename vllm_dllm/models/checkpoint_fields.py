"""What a checkpoint's config.json may say: each family has one table of fields, and this is how it is read.

A field changes the arithmetic or it does not. Those that do are in the family's table, with the values that the model
class implements; those that do not are listed by name. Any other is refused, since nobody knows what it asks for.
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_dllm.errors import ConfigError

Size = Annotated[int, Field(ge=1, description="whole numbers from 1 on")]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False, description="finite numbers above 0")]
Flag = Annotated[bool, Field(description="true and false")]
MaybeFlag = Annotated[bool | None, Field(description="null, true and false")]
TokenId = Annotated[int, Field(ge=0, description="token ids from 0 on")]
Off = Annotated[Literal[False] | None, Field(description="false, as the model class does not implement it")]
On = Annotated[Literal[True], Field(description="true, as the model class implements no other")]
Unset = Annotated[None, Field(description="null, as the model class does not implement it")]
MaybeSize = Annotated[Size | None, Field(description="null and whole numbers from 1 on")]
MaybeId = Annotated[TokenId | None, Field(description="null and token ids from 0 on")]

# Of transformers, which saves them, and of training; none of them is read by a model class.
BOOKKEEPING = frozenset(
    """
    _attn_implementation architectures auto_map model_type dtype torch_dtype transformers_version name_or_path use_cache
    return_dict output_hidden_states output_attentions id2label label2id num_labels problem_type
    chunk_size_feed_forward torchscript pruned_heads use_bfloat16 tf_legacy_loss tie_encoder_decoder is_decoder
    cross_attention_hidden_size add_cross_attention finetuning_task task_specific_params tokenizer_class prefix
    attn_implementation experts_implementation quantization_config compression_config sep_token_id
    decoder_start_token_id unk_token_id canvas_length

    attention_dropout embedding_dropout residual_dropout hidden_dropout initializer_range init_cutoff_factor
    init_device init_fn init_std precision flash_attention fuse_cross_entropy debug gradient_checkpointing

    max_length max_new_tokens min_length min_new_tokens do_sample early_stopping num_beams num_beam_groups
    diversity_penalty temperature top_k top_p min_p typical_p epsilon_cutoff eta_cutoff repetition_penalty
    encoder_repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens max_time
    """.split()  # noqa: SIM905 - a list of words is read more easily
)


class CheckpointFields(BaseModel):
    """Fields of every family; one that is absent has the value of the published checkpoints."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    mask_token_id: MaybeId = None
    eot_token_id: MaybeId = None
    bos_token_id: MaybeId = None
    pad_token_id: MaybeId = None
    eos_token_id: Annotated[
        TokenId | Annotated[list[TokenId], Field(min_length=1)] | None,
        Field(description="null, token ids from 0 on, and lists of them"),
    ] = None
    rope_theta: Any = None  # these three are read together, by `rope_fields`
    rope_scaling: Any = None
    rope_parameters: Any = None
    is_encoder_decoder: Off = None


SPECIAL_IDS = ("mask_token_id", "eos_token_id", "eot_token_id", "bos_token_id", "pad_token_id")

Fields = TypeVar("Fields", bound=BaseModel)


def refuse_unknown(given: Mapping[str, Any], known: frozenset[str], where: str) -> None:
    """Raise: ConfigError for a name that nobody knows, unless its value is null or its name transformers' own."""
    unknown = [
        name
        for name, value in given.items()
        if value is not None and name not in known | BOOKKEEPING and not name.startswith("_")
    ]
    if unknown:
        name = unknown[0]
        more = f" (as are {', '.join(unknown[1:])})" if unknown[1:] else ""
        raise ConfigError(
            f"{name} in {where} is {given[name]!r}, but no field of this family has that name{more}, so it could ask "
            f"for other arithmetic; if it does not, remove it or pass --hf-overrides '{{\"{name}\": null}}'"
        )


def _is_dtype(value: Any) -> bool:
    dtype = getattr(torch, value, None) if isinstance(value, str) else value
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point


def _is_object(value: Any) -> bool:
    return isinstance(value, Mapping)


# Of the bookkeeping, what transformers and vLLM act on while they read a file: the test of values, and what is allowed.
_READ_BY_OTHERS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("torch_dtype", "dtype"), (_is_dtype, "null and torch's floating-point types, as 'bfloat16'")),
    **dict.fromkeys(("quantization_config", "compression_config"), (_is_object, "null and objects")),
}


def misfits(given: Mapping[str, Any]) -> dict[str, str]:
    """Return the fields that transformers and vLLM could not read, and what they allow."""
    return {
        name: allowed
        for name, (fits, allowed) in _READ_BY_OTHERS.items()
        if given.get(name) is not None and not fits(given[name])
    }


def refuse_misfits(given: Mapping[str, Any], where: str) -> None:
    """Raise: ConfigError for the first of `misfits`."""
    for name, allowed in misfits(given).items():
        raise ConfigError(f"{name} in {where} is {given[name]!r}, allowed are {allowed}; correct it there")


def validated(table: type[Fields], given: Mapping[str, Any], prefix: str = "") -> Fields:
    """Check values against a table.

    Args:
        table: the fields, with a description of what each allows.
        given: their values.
        prefix: what messages put before a name.

    Raises: ConfigError for the first value that is not allowed or missing.
    """
    try:
        return table.model_validate(dict(given))
    except ValidationError as error:
        finding = error.errors()[0]
    name = str(finding["loc"][0])
    # A type of rope is asked for by its name alone, whichever object holds it.
    shown = name if name in ("rope_type", "rope_theta") else prefix + name
    if finding["type"] in ("extra_forbidden", "invalid_key"):  # the latter is no text
        known = ", ".join(table.model_fields)
        raise ConfigError(
            f"{shown} in the checkpoint's config.json is {finding['input']!r}, but it is not known; allowed are "
            f"{known}; remove it there or replace it with --hf-overrides"
        )
    what = f"is {given[name]!r}" if name in given else "is missing"
    raise ConfigError(
        f"{shown} in the checkpoint's config.json {what}, allowed are {_allowed(table, name)}; correct it there or "
        "with --hf-overrides"
    )


def _allowed(table: type[BaseModel], name: str) -> str:
    """Return a field's description, or that of the type it wraps."""
    field = table.model_fields[name]
    found = field.description or next(
        metadata.description
        for option in get_args(field.annotation)
        for metadata in getattr(option, "__metadata__", ())
        if getattr(metadata, "description", None)
    )
    return str(found)


def check_token_ids(ids: Mapping[str, Any], num_tokens: int, where: str) -> None:
    """Check special token ids against a vocabulary.

    Args:
        ids: the value of each field: an id, a list of ids, or None.
        num_tokens: rows of the embedding.
        where: the file or setting, for the message.

    Raises: ConfigError.
    """
    for name, value in ids.items():
        for token_id in value if isinstance(value, list | tuple) else [value]:
            if token_id is None and value is None:
                continue
            if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < num_tokens:
                raise ConfigError(
                    f"{name} in {where} is {value!r}, but the vocabulary has {num_tokens} tokens; allowed are ids from "
                    f"0 to {num_tokens - 1}; correct it there{_override(where)}"
                )


def _override(where: str) -> str:
    return " or with --hf-overrides" if where.endswith("config.json") and "generation" not in where else ""
