"""The configuration class that the families' are made of: a table of fields becomes attributes, or is refused."""

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

from transformers import PretrainedConfig

from vllm_dllm.errors import ConfigError
from vllm_dllm.models.checkpoint_fields import (
    BOOKKEEPING,
    SPECIAL_IDS,
    CheckpointFields,
    check_token_ids,
    misfits,
    refuse_misfits,
    refuse_unknown,
    validated,
)
from vllm_dllm.models.rope_fields import ROPE_NAMES, num_positions, override_rope, read_rope

WHERE = "the checkpoint's config.json"
_IS_FILE = "_vllm_dllm_is_file"


class CheckpointConfig(PretrainedConfig):
    """A checkpoint's config.json under its published names.

    Setting a field of the table, as --hf-overrides do, is as if the file said it: everything is read and checked again.
    A file that is refused is so when a field is first read, since --hf-overrides, which come between, may mend it.

    Attributes:
        table: the fields that change the arithmetic, and their values.
        bookkeeping: the names of the family's other fields, besides those of every family.
        published_mask_token_id: the mask token of checkpoints that name none and have a published vocabulary.
        published_eot_token_id: the token that ends a turn besides EOS, where the mask token is the published one, or
            None.
        published_vocab_sizes: rows of the published embeddings.
        qkv_bias: whether query, key and value have biases.
        qk_norm: whether query and key are normalised per head.
        has_experts: whether the feed-forward network is a mixture of experts, behind the first `num_dense_layers`.
        has_expert_bias: whether experts fall into groups, and are chosen by scores with a bias.
        fuses_qkv: whether query, key and value are one tensor of a checkpoint.
        tensor_names: published names of modules by Qwen's, where they differ.

    Raises: ConfigError for a field whose value asks for arithmetic that the model class does not implement, for
        numbers that cannot work, and for a field that is not known.
    """

    table: ClassVar[type[CheckpointFields]]
    bookkeeping: ClassVar[frozenset[str]] = frozenset()
    published_mask_token_id: ClassVar[int]
    published_eot_token_id: ClassVar[int | None]
    published_vocab_sizes: ClassVar[tuple[int, ...]]
    qkv_bias: ClassVar[bool] = False
    qk_norm: ClassVar[bool] = False
    has_experts: ClassVar[bool] = False
    has_expert_bias: ClassVar[bool] = False
    fuses_qkv: ClassVar[bool] = False
    tensor_names: ClassVar[Mapping[str, str]] = {}
    has_no_defaults_at_init = True

    def __init__(self, **given: Any) -> None:
        is_file = given.pop(_IS_FILE, False)
        problem = None
        try:
            values = self._read(given)
        except ConfigError as error:
            if not is_file:
                raise
            values, problem = {name: given.get(name) for name in SPECIAL_IDS}, error
        for name, value in values.items():
            setattr(self, name, value)
        names = given.keys() & (self.bookkeeping | BOOKKEEPING)  # some others transformers would act on
        super().__init__(**{name: given[name] for name in names - self._attributes() - misfits(given).keys()})
        self._given, self._problem = given, problem
        self._rope_overrides: dict[str, Any] = {}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make a configuration of a file's content; what is wrong with it is raised when a field is read."""
        return super().from_dict({**config_dict, _IS_FILE: True}, **kwargs)

    def update(self, config_dict: dict[str, Any]) -> None:
        """Set fields, all at once; a null is also an answer to a field that is not known."""
        refuse_unknown(config_dict, self.known_names(), "--hf-overrides")
        fields = self._attributes() | self._given.keys()
        if not fields.isdisjoint(config_dict):
            self._change({name: value for name, value in config_dict.items() if name in fields})
        super().update({name: value for name, value in config_dict.items() if name not in self._attributes()})

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; a field of the table is read anew."""
        is_read = "_given" in self.__dict__ and name in self._attributes()
        if is_read and (self._problem is not None or getattr(self, name, None) != value):
            self._change({name: value})
            return
        if "_given" in self.__dict__ and name == "quantization_config":  # set by vLLM, which reads it at once
            refuse_misfits({name: value}, WHERE)
        if "_given" in self.__dict__ and isinstance(value, Mapping):  # an override that is an object, set by vLLM
            refuse_unknown({name: value}, self.known_names(), "--hf-overrides")
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        """Raise what is wrong with the file where a field of it is asked for."""
        problem = self.__dict__.get("_problem")
        # vLLM looks at those of rotation before it sets the overrides that are objects.
        is_rotation = name in (*ROPE_NAMES, "partial_rotary_factor")
        if problem is not None and name in self._attributes() and not is_rotation:
            raise problem
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    @property
    def num_positions(self) -> int:
        """How many positions can be rotated; no row may be longer."""
        return num_positions(self.rope_parameters, self.max_position_embeddings)

    def standardize_rope_params(self) -> None:
        """Do nothing: `rope_parameters` are what transformers would make them."""

    def validate_rope(self) -> None:
        """Do nothing: `rope_parameters` were checked when they were read."""

    def resolve(self, fields: Any) -> dict[str, Any]:
        """Return the numbers that fields of the table stand for, by attribute."""
        raise NotImplementedError

    @property
    def num_dense_layers(self) -> int:
        """Layers at the start that have no experts, in a model whose others have."""
        return 0

    @classmethod
    def rotated_part(cls, _fields: Any, head_dim: int) -> int:
        """Return how many elements of a head are rotated, the first ones."""
        return head_dim

    @classmethod
    def known_names(cls) -> frozenset[str]:
        """Return the names that config.json and --hf-overrides may have."""
        return cls._attributes() | cls.bookkeeping

    @classmethod
    def _attributes(cls) -> frozenset[str]:
        return frozenset(cls.table.model_fields) | frozenset(cls.attribute_map)

    @classmethod
    def _published(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return fields under their published names, where some have Qwen's."""
        fields = {name: value for name, value in given.items() if name not in cls.attribute_map}
        for alias, name in cls.attribute_map.items():
            if alias in given and fields.setdefault(name, given[alias]) != given[alias]:
                raise ConfigError(
                    f"{alias} in {WHERE} is {given[alias]!r}, but {name}, which is the same, is {fields[name]!r}; "
                    "allowed is one value; remove one of them"
                )
        return fields

    def _change(self, changes: Mapping[str, Any]) -> None:
        """Read again what was given, with these changes."""
        given = {n: v for n, v in self._given.items() if n not in changes and self._alias(n) not in changes}
        if rope := {name: value for name, value in changes.items() if name in ROPE_NAMES}:
            self.__dict__["_rope_overrides"] = self._rope_overrides | rope
            given = override_rope(given, self._rope_overrides)
        given |= changes
        try:
            values = self._read(given)
        except ConfigError as error:
            if self._problem is None:
                raise
            # vLLM sets the overrides that are objects after the others, so what is still wrong may yet be mended.
            self.__dict__.update(_given=given, _problem=error)
            return
        del self.__dict__["_given"]
        self._problem = None
        for name, value in values.items():
            setattr(self, name, value)
        self._given = given

    def _alias(self, name: str) -> str:
        """Return the other name of an attribute that has two."""
        other = {published: alias for alias, published in self.attribute_map.items()}
        return self.attribute_map.get(name) or other.get(name, name)

    def _read(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the attributes that fields stand for, or raise ConfigError."""
        published = self._published(copy.deepcopy(dict(given)))
        refuse_unknown(published, self.known_names(), WHERE)
        refuse_misfits(published, WHERE)
        table = self.table.model_fields
        present = {name: value for name, value in published.items() if name in table}
        fields = validated(self.table, present)
        values = {**{name: getattr(fields, name) for name in present}, **self.resolve(fields)}
        qwen = {alias: values[name] for alias, name in self.attribute_map.items()} | values
        values["head_dim"] = qwen["head_dim"] = _head_dim(qwen)
        part = self.rotated_part(fields, values["head_dim"])
        rope = read_rope(
            present, max_positions=qwen["max_position_embeddings"], head_dim=values["head_dim"], rotary_dim=part
        )
        values.pop("rope_scaling", None)  # transformers' other name of `rope_parameters`
        values |= {"rope_parameters": rope, "rope_theta": rope["rope_theta"]}
        return values | self._special_ids(fields, qwen["vocab_size"])

    def _special_ids(self, fields: CheckpointFields, num_tokens: int) -> dict[str, Any]:
        """Return the special ids, checked, with the published ones where they belong."""
        ids = {name: getattr(fields, name) for name in SPECIAL_IDS}
        if ids["mask_token_id"] is None:
            if num_tokens not in self.published_vocab_sizes:
                sizes = " or ".join(map(str, self.published_vocab_sizes))
                raise ConfigError(
                    f"mask_token_id in {WHERE} is missing or null, but the vocabulary has {num_tokens} tokens, and the "
                    f"published ones {sizes}; allowed are ids from 0 to {num_tokens - 1}; name it there or pass "
                    "--hf-overrides '{\"mask_token_id\": N}'"
                )
            ids["mask_token_id"] = self.published_mask_token_id
        if (
            ids["eot_token_id"] is None
            and ids["mask_token_id"] == self.published_mask_token_id
            and self.published_eot_token_id is not None
            and self.published_eot_token_id < num_tokens
        ):
            ids["eot_token_id"] = self.published_eot_token_id
        check_token_ids(ids, num_tokens, WHERE)
        mask, eos = ids["mask_token_id"], ids["eos_token_id"]
        for name, ends in (
            ("eos_token_id", eos if isinstance(eos, list) else [eos]),
            ("eot_token_id", [ids["eot_token_id"]]),
        ):
            if mask in ends:
                raise ConfigError(
                    f"mask_token_id in {WHERE} is {mask}, which {name} is too, but a mask token is never output; "
                    "allowed are two different ids; correct one of them"
                )
        return ids

    def _remove_keys_not_serialized(self, d: dict[str, Any]) -> None:
        super()._remove_keys_not_serialized(d)
        for name in ("_given", "_problem", "_rope_overrides"):
            d.pop(name, None)


def _head_dim(qwen: Mapping[str, Any]) -> int:
    """Return the size of a head of numbers under Qwen's names; raises ConfigError where they cannot work together."""
    width, heads, kv_heads = qwen["hidden_size"], qwen["num_attention_heads"], qwen["num_key_value_heads"]
    if qwen["head_dim"] is None and width % heads:
        raise ConfigError(
            f"the number of heads in {WHERE} is {heads}, which does not divide the width {width}; allowed are its "
            "divisors; correct n_heads or d_model (num_attention_heads or hidden_size)"
        )
    if heads % kv_heads:
        raise ConfigError(
            f"the number of key heads in {WHERE} is {kv_heads}, which does not divide the {heads} query heads; allowed "
            "are divisors; correct n_kv_heads or n_heads (num_key_value_heads or num_attention_heads)"
        )
    head_dim: int = width // heads if qwen["head_dim"] is None else qwen["head_dim"]
    if head_dim % 2:
        raise ConfigError(
            f"heads in {WHERE} have {head_dim} elements, but they are rotated in pairs; allowed are even numbers; "
            "correct head_dim, or the width or the number of heads (d_model, n_heads, hidden_size, num_attention_heads)"
        )
    return head_dim
