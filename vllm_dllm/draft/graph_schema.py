"""The form of a graph file, as a schema: fields, types and ranges. What ties them together is in `graph_file`."""

import datetime
import reprlib
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError, field_validator
from pydantic_core import ErrorDetails

from vllm_dllm.config import DllmConfig
from vllm_dllm.draft.graph import MAX_CANDIDATES, MAX_NODES
from vllm_dllm.errors import GraphError, did_you_mean
from vllm_dllm.kv_settings import STRICT
from vllm_dllm.policy_options import allowed_policies

SCHEMA_VERSION = 1
MAX_POSITION_RANK = 1023

REMEDY = "correct it, or make the graph anew with 'vllm-dllm calibrate'"

_Text = Annotated[str, Field(min_length=1, max_length=4096)]
# JSON readers that keep numbers as float64 have to read it unchanged.
_Count = Annotated[int, Field(ge=0, lt=1 << 53)]
_Share = Annotated[float, Field(ge=0.0, le=1.0)]
_Expected = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
_Weight = Annotated[float, Field(ge=-100.0, le=100.0)]
_WEIGHTS = "numbers from -100 to 100"
_Forwards = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
_PositionRank = Annotated[int, Field(ge=0, le=MAX_POSITION_RANK)]
_VocabRank = Annotated[int, Field(ge=0, lt=MAX_CANDIDATES)]

# Each field's description says what is allowed, in error messages.


class PromptsFile(BaseModel):
    """Prompts of a calibration: the file's name, its SHA-256 in hexadecimal, and how many were decoded."""

    model_config = STRICT

    file: _Text = Field(description="file names")
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="64 hexadecimal digits in lower case")
    num_prompts: int = Field(ge=1, lt=1 << 53, description="whole numbers from 1 on")


class Versions(BaseModel):
    """Versions of the software that calibrated."""

    model_config = STRICT

    vllm_dllm: _Text = Field(description="version texts")
    vllm: _Text = Field(description="version texts")
    torch: _Text = Field(description="version texts")


_SHAPE_FIELDS = {
    "vocab_size": ("embedding_size", "vocab_size"),
    "hidden_size": ("hidden_size", "d_model"),
    "num_hidden_layers": ("num_hidden_layers", "n_layers"),
}
"""Field -> the names of it in configurations of checkpoints; the first one that is given counts."""


class ModelShape(BaseModel):
    """What tells models of a family apart, wherever their files are and whatever their folder is called."""

    model_config = STRICT

    vocab_size: int = Field(ge=1, lt=1 << 53, description="whole numbers from 1 on")
    hidden_size: int = Field(ge=1, lt=1 << 53, description="whole numbers from 1 on")
    num_hidden_layers: int = Field(ge=1, lt=1 << 53, description="whole numbers from 1 on")

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "ModelShape | None":
        """Read it from a checkpoint's configuration; None where that leaves a field to its class."""
        found = {
            field: next((config[name] for name in names if config.get(name) is not None), None)
            for field, names in _SHAPE_FIELDS.items()
        }
        return cls.model_validate(found) if all(type(value) is int and value > 0 for value in found.values()) else None

    def __str__(self) -> str:
        """Write it for messages."""
        return ", ".join(f"{name} {value}" for name, value in self)


class Provenance(BaseModel):
    """Where a graph's counts come from.

    Attributes:
        model: name or path of the checkpoint.
        family: the model's family, as `model_type` of its configuration.
        shape: of the model; None in files of versions that did not write it.
        settings: of the server that decoded the prompts.
        temperature: of the requests.
        prompts: the files they came from; several after a merge.
        acceptance_by_depth: of the drafts of depth 1, 2, ...: the share that was accepted, on prompts held out.
        predicted_nfe: budget -> forwards per generation, on prompts held out.
        seed: of the calibration.
        versions: of the software.
        date: of the calibration.
    """

    model_config = STRICT

    model: _Text = Field(description="names and paths of models")
    family: _Text = Field(description="names of model families")
    shape: ModelShape | None = Field(
        default=None, description=f"null and objects with the fields {', '.join(ModelShape.model_fields)}"
    )
    settings: DllmConfig = Field(description="objects with a server's settings")
    temperature: float = Field(ge=0.0, allow_inf_nan=False, description="finite numbers from 0 on")
    prompts: tuple[PromptsFile, ...] = Field(min_length=1, description="lists of at least one prompts file")
    acceptance_by_depth: tuple[_Share, ...] = Field(default=(), description="lists of numbers from 0 to 1")
    predicted_nfe: dict[Annotated[int, Field(ge=0, le=MAX_NODES)], _Forwards] = Field(
        default={}, description=f"objects from budgets 0..{MAX_NODES} to finite numbers from 0 on"
    )
    seed: int = Field(ge=0, lt=1 << 53, description="whole numbers from 0 on")
    versions: Versions = Field(description="objects with the fields vllm_dllm, vllm and torch")
    date: datetime.date = Field(description="dates like '2026-01-31'")

    @field_validator("predicted_nfe")
    @classmethod
    def _by_budget(cls, forwards: dict[int, float]) -> dict[int, float]:
        return dict(sorted(forwards.items()))


class ReadinessSchema(BaseModel):
    """What orders masked positions, see `readiness.Readiness`."""

    model_config = STRICT

    slope: _Weight = Field(description=_WEIGHTS)
    near: tuple[_Weight, _Weight] = Field(description=f"lists of two {_WEIGHTS}")
    bias: _Weight = Field(default=0.0, description=_WEIGHTS)


class TokensSchema(BaseModel):
    """What orders the tokens of a position, see `token_weights.TokenWeights`."""

    model_config = STRICT

    slope: _Weight = Field(description=_WEIGHTS)
    slope_beside_new: _Weight = Field(default=0.0, description=_WEIGHTS)
    same: tuple[_Weight, _Weight, _Weight, _Weight] = Field(
        default=(0.0, 0.0, 0.0, 0.0), description=f"lists of four {_WEIGHTS}"
    )


class NodeSchema(BaseModel):
    """A node of a graph file."""

    model_config = STRICT

    formula: tuple[tuple[_PositionRank, _VocabRank], ...] = Field(
        min_length=1,
        description="lists of at least one [position rank, vocab rank] pair, whole numbers "
        f"0..{MAX_POSITION_RANK} and 0..{MAX_CANDIDATES - 1}",
    )
    count: _Count | None = Field(default=None, description="whole numbers from 0 on")
    expected: _Expected | None = Field(default=None, description="finite numbers from 0 on")


class GraphSchema(BaseModel):
    """A graph file."""

    model_config = STRICT

    schema_version: int = Field(ge=SCHEMA_VERSION, le=SCHEMA_VERSION, description=f"only version {SCHEMA_VERSION}")
    tokens_per_step: int | None = Field(
        ge=1, le=MAX_POSITION_RANK + 1, description="null and whole numbers from 1 to 1024"
    )
    num_anchors: _Count = Field(default=0, description="whole numbers from 0 on")
    readiness: ReadinessSchema | None = Field(default=None, description="null and objects")
    tokens: TokensSchema | None = Field(default=None, description="null and objects")
    nodes: tuple[NodeSchema, ...] = Field(
        min_length=1,
        max_length=MAX_NODES,
        description=f"lists of 1 to {MAX_NODES} objects with the fields {', '.join(NodeSchema.model_fields)}",
    )
    provenance: Provenance | None = Field(default=None, description="null and objects")


_NESTED: dict[str, type[BaseModel]] = {
    "nodes": NodeSchema,
    "readiness": ReadinessSchema,
    "tokens": TokensSchema,
    "provenance": Provenance,
    "settings": DllmConfig,
    "prompts": PromptsFile,
    "versions": Versions,
    "shape": ModelShape,
}
"""Fields that hold objects, and their schema."""


def read_schema(text: str, where: str) -> GraphSchema:
    """Check the form of a graph file's text; the text's objects have no repeated keys.

    Raises: GraphError naming `where`, the path inside it, what was given, what is allowed and what to do.
    """
    try:
        return GraphSchema.model_validate_json(text)
    except ValidationError as error:
        findings = error.errors(include_url=False)
        # A field that is missing may be there under a name that is not known.
        raise _explain(min(findings, key=lambda finding: finding["type"] != "extra_forbidden"), where) from None


def _explain(finding: ErrorDetails, where: str) -> GraphError:
    """Turn a finding of the schema library into our three-part message."""
    location = [part for part in finding["loc"] if part != "[key]"]
    subject = f"{where}: {_path(location)}" if location else where
    kind, value = finding["type"], finding["input"]
    owner, description = _described(location)
    if kind == "json_invalid":
        return GraphError(f"{where} is not JSON of a graph ({finding['msg'].removeprefix('Invalid JSON: ')}); {REMEDY}")
    if kind == "value_error":  # a rule between settings, whose text is already ours
        return GraphError(f"{subject}: {finding['msg'].removeprefix('Value error, ')}")
    if kind == "policy":
        description = allowed_policies()
    if kind == "parameter":
        of = finding["ctx"]
        subject, value, description = f"{subject}.{of['name']}", of["value"], of["allowed"]
    if kind == "extra_forbidden":
        todo = did_you_mean(location[-1], owner.model_fields, "remove or rename it")
        return GraphError(f"{subject} is not known; allowed are {', '.join(owner.model_fields)}; {todo}")
    if kind == "missing":
        return GraphError(f"{subject} is missing; allowed are {description}; {REMEDY}")
    given = f"has {len(value)} entries" if kind in {"too_long", "too_short"} else f"is {reprlib.repr(value)}"
    return GraphError(f"{subject} {given}, allowed are {description}; {REMEDY}")


def _described(location: list[int | str]) -> tuple[type[BaseModel], str]:
    """Return the schema of the object that holds a place, and what is allowed there."""
    owner: type[BaseModel] = GraphSchema
    description = f"objects with the fields {', '.join(GraphSchema.model_fields)}"
    for key in location:
        if isinstance(key, int):
            continue
        if key not in owner.model_fields:
            break
        description = str(owner.model_fields[key].description)
        if key not in _NESTED:
            break
        owner = _NESTED[key]
    return owner, description


def _path(location: list[int | str]) -> str:
    """Write a place as in `nodes[3].formula[0][1]`."""
    parts = [f".{key}" if isinstance(key, str) and key.isidentifier() else f"[{reprlib.repr(key)}]" for key in location]
    return "".join(parts).removeprefix(".")
