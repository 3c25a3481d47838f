"""Settings of Spiffy, as `speculative_config` gives them: a file, JSON text or an object.

The server's front end reads them once, puts the draft graph in the place of its file's path and passes the whole on as
JSON (`to_json_object`); every process makes its `SpiffySettings` of that. Nothing here imports vLLM or torch.
"""

import functools
import json
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, ValidationError, model_validator

from vllm_dllm.config import DllmConfig, InvalidOptionError, explain
from vllm_dllm.draft.graph import MAX_NODES, DraftGraph
from vllm_dllm.draft.graph_file import (
    check_fit,
    default_graph,
    dump_graph,
    load_graph,
    parse_graph,
    refuse_repeated_keys,
)
from vllm_dllm.draft.graph_schema import ModelShape
from vllm_dllm.draft.provenance import calibrate_command
from vllm_dllm.draft.ranker_file import RankerFile, check_ranker, load_ranker
from vllm_dllm.errors import ConfigError, did_you_mean_file, nearest
from vllm_dllm.kv_settings import STRICT
from vllm_dllm.names import DELAYED

METHOD = "spiffy"
DEFAULT_GRAPH = "default"
DEFAULT_MAX_NODES = 10

Exactness = Literal["exact", "near"]

_NAME = "speculative_config"


class SpiffyConfig(BaseModel):
    """`speculative_config` of method `spiffy`.

    Attributes:
        method: says that the rest is ours.
        draft_graph: path of a draft graph's file, its content, or `default`: the shipped graph that suits the server's
            policy, model family and block length best.
        ranker: path of a file of `vllm-dllm calibrate --ranker`, which says which positions come next; null: none does.
        budget: draft nodes that a step evaluates, the likeliest of the graph; `auto` chooses how many at every step.
        max_nodes: the most that `auto` may choose; null is 10. A fixed budget may not be larger.
        exactness: `exact` refuses KV policies under which the tokens could differ from those without speculation.
    """

    model_config = STRICT

    method: Annotated[Literal["spiffy"], Field(description="'spiffy'")]
    draft_graph: Annotated[
        str | dict[Any, Any],
        Field(description="'default', the path of a file of `vllm-dllm calibrate`, and the content of such a file"),
    ] = DEFAULT_GRAPH
    ranker: Annotated[
        str | None, Field(description="null and the path of a file of `vllm-dllm calibrate --ranker`")
    ] = None
    budget: Annotated[
        Literal["auto"] | Annotated[int, Field(ge=0, le=MAX_NODES)],
        Field(description=f"'auto' and whole numbers from 0 to max_nodes, at most {MAX_NODES}"),
    ] = "auto"
    max_nodes: Annotated[
        Annotated[int, Field(ge=1, le=MAX_NODES)] | None,
        Field(description=f"null and whole numbers from 1 to {MAX_NODES}"),
    ] = None
    exactness: Annotated[Exactness, Field(description="'exact' and 'near'")] = "exact"

    @property
    def fixed_budget(self) -> int | None:
        """The budget of every step; None where each step has its own."""
        return None if self.budget == "auto" else self.budget

    @model_validator(mode="after")
    def _budget_within_nodes(self) -> Self:
        if self.max_nodes is not None and (self.fixed_budget or 0) > self.max_nodes:
            raise ValueError(
                f"budget is {self.budget} but max_nodes is {self.max_nodes}; give a budget of 'auto' or "
                f"0..{self.max_nodes}, or leave max_nodes out"
            )
        return self


@dataclass(frozen=True, slots=True)
class SpiffySettings:
    """What the engine needs to know.

    Attributes:
        graph: the draft graph; of windows that slide a chain, which says no more than how many drafts there are.
        budget: draft nodes that every step evaluates, 0..max_nodes; None: chosen per step.
        max_nodes: most draft nodes that a step evaluates, at most len(graph).
        exactness: what is true of the tokens under the server's KV policy, not what was asked for.
        source: where the graph came from, for messages.
        warnings: sentences on how the graph could suit the server better.
        ranker: the order ranker, whose readiness is the graph's; None: none.
        is_chain: whether drafts are a chain of later windows, and no graph.
    """

    graph: DraftGraph
    budget: int | None
    max_nodes: int
    exactness: Exactness
    source: str
    warnings: tuple[str, ...]
    ranker: RankerFile | None = None
    is_chain: bool = False

    @property
    def drafts(self) -> str:
        """What drafts are made of, for messages."""
        if self.is_chain:
            return f"{self.source}, up to {len(self.graph)} later windows"
        return f"draft graph {self.source} with {len(self.graph)} nodes"


def read_speculative_config(value: object) -> object:
    """Return what a path or JSON text stands for; anything else is returned as it is.

    The paths of a draft graph and a ranker that stand in a file are relative to this file.

    Raises: InvalidOptionError.
    """
    if not isinstance(value, str | Path):
        return value
    text, folder = str(value), None
    if isinstance(value, Path) or not text.lstrip().startswith("{"):
        try:
            if text and Path(value).is_dir():
                raise _unreadable(text, "this is a folder")
            if not Path(value).is_file():
                defaults = f'for the defaults give {{"method": "{METHOD}"}} or --spec-method {METHOD}'
                is_method = text == METHOD or nearest(text, [METHOD])
                todo = defaults if is_method else did_you_mean_file(text, "correct it")
                raise _unreadable(text, "there is no such file", todo)
            text, folder = Path(value).read_text(encoding="utf-8"), Path(value).parent
        except OSError as error:
            raise _unreadable(text, f"this file cannot be read ({error.strerror})") from None
        except UnicodeDecodeError as error:
            raise _unreadable(text, f"this file is not UTF-8 text (byte {error.start})") from None
    try:
        content = json.loads(text, object_pairs_hook=refuse_repeated_keys)
    except (ValueError, RecursionError) as error:
        raise _unreadable(str(value), f"this is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise _unreadable(str(value), "this holds no object")
    return content if folder is None else content | _from_folder(content, folder)


def _from_folder(content: Mapping[str, object], folder: Path) -> dict[str, str]:
    """Return the fields that are paths, relative to a folder."""
    found = {name: content.get(name) for name in ("draft_graph", "ranker")}
    is_word = found["draft_graph"] == DEFAULT_GRAPH
    return {
        name: str(folder / path)
        for name, path in found.items()
        if isinstance(path, str) and not (name == "draft_graph" and is_word)
    }


def _unreadable(value: str, reason: str, todo: str = "correct it") -> InvalidOptionError:
    return InvalidOptionError(
        f"{_NAME} is {value!r}, but {reason}; allowed are an object, its JSON text and the path of a file that "
        f"holds this text; {todo}",
        _NAME,
        value,
    )


def field_names(given: Mapping[object, Any]) -> dict[str, Any]:
    """Return a `speculative_config` by our names of its fields, which may be written with `-` for `_`.

    Raises: InvalidOptionError for a field that is given by both.
    """
    fields: dict[str, Any] = {}
    written: dict[str, str] = {}
    for key, value in given.items():
        name = str(key).replace("-", "_")
        if name in fields:
            first, second = f"{_NAME}.{written[name]}", f"{_NAME}.{key}"
            raise InvalidOptionError(
                f"{first} is {reprlib.repr(fields[name])} and {second} is {reprlib.repr(value)}, but both are "
                f"{_NAME}.{name}; allowed is one of them; remove the other",
                second,
                value,
            )
        fields[name], written[name] = value, str(key)
    return fields


def parse_spiffy(given: Mapping[str, Any]) -> SpiffyConfig:
    """Check the fields of a `speculative_config` of method `spiffy`.

    Raises: InvalidOptionError naming the field, what was given, what is allowed and what to do.
    """
    if (number := given.get("num_speculative_tokens")) is not None:
        raise InvalidOptionError(
            f"{_NAME}.num_speculative_tokens is {reprlib.repr(number)}, but drafts of {METHOD!r} are nodes of a graph, "
            f"not tokens ahead; allowed are {', '.join(SpiffyConfig.model_fields)}; give {_NAME}.budget for how many "
            f"drafts a step evaluates, or {_NAME}.max_nodes for the most that budget 'auto' may choose",
            f"{_NAME}.num_speculative_tokens",
            number,
        )
    try:
        return SpiffyConfig.model_validate(dict(given))
    except ValidationError as error:
        raise explain(error, SpiffyConfig, f"{_NAME}.") from None


def to_json_object(config: SpiffyConfig) -> dict[str, Any]:
    """Return what other processes need to make `SpiffySettings`, with the graph instead of its path.

    A ranker's weights stay in their file, which every machine reads that serves, like the model's.

    Raises: ConfigError for a graph or a ranker that cannot be read.
    """
    if config.ranker is not None:
        load_ranker(config.ranker)
        config = config.model_copy(update={"ranker": str(Path(config.ranker).absolute())})
    given, source = config.draft_graph, f"{_NAME}.draft_graph"
    if given == DEFAULT_GRAPH:
        return {"config": config.model_dump(), "source": DEFAULT_GRAPH}
    if isinstance(given, str):
        graph_file, source = load_graph(given, [DEFAULT_GRAPH]), given
    else:
        graph_file = parse_graph(given, source)
    return {"config": config.model_dump() | {"draft_graph": json.loads(dump_graph(graph_file))}, "source": source}


@functools.lru_cache(maxsize=8)
def spiffy_settings(
    text: str, server: DllmConfig, model: str, family: str, shape: ModelShape | None = None
) -> SpiffySettings:
    """Make the settings of `to_json_object`'s JSON text; once per process.

    Args:
        text: the JSON text.
        server: settings of the server.
        model: name or path of the server's model.
        family: `model_type` of the server's model.
        shape: of the server's model.

    Raises: ConfigError for a graph that does not fit the block, and for a KV policy that is not exact where `exact`
        was asked for.
    """
    content = json.loads(text)
    if not isinstance(content, dict) or content.keys() != {"config", "source"}:
        raise ConfigError(
            f"additional_config.spiffy is {reprlib.repr(content)}, but it is made of {_NAME}; allowed is none; remove "
            f"it and give {_NAME}"
        )
    config, source = parse_spiffy(content["config"]), content["source"]
    exactness = _exactness(config, server)
    if server.has_windows:
        return _chain_settings(config, server.block_length)
    if source == DEFAULT_GRAPH:
        graph = default_graph(server.policy, server.block_length, family).graph
        warnings = [
            f"{_NAME}.draft_graph is 'default', which was not made for this model; for a better one run: "
            f"{calibrate_command(server, model)}"
        ]
    else:
        graph_file = parse_graph(config.draft_graph, source)
        graph = graph_file.graph
        warnings = check_fit(graph_file, server, where=source, model=model, family=family, shape=shape)
    ranker = None if config.ranker is None else load_ranker(config.ranker)
    if ranker is not None:
        said = check_ranker(ranker, server, graph.readiness, model=model, family=family, shape=shape)
        warnings, graph = [*warnings, *said], replace(graph, readiness=ranker.readiness)
    return _settings(config, graph, exactness, source, warnings, ranker)


def _settings(
    config: SpiffyConfig,
    graph: DraftGraph,
    exactness: Exactness,
    source: str,
    warnings: Sequence[str],
    ranker: RankerFile | None = None,
) -> SpiffySettings:
    """Put settings together; a fixed budget of more nodes than there are is one of all, as a warning says."""
    budget, num_nodes = config.fixed_budget, len(graph)
    if (budget or 0) > num_nodes:
        more = f"{_NAME}.budget is {budget}, but {source} has {num_nodes} nodes: so many are used"
        warnings = [*warnings, more]
    most = config.max_nodes or DEFAULT_MAX_NODES if budget is None else budget
    return SpiffySettings(
        graph=graph,
        budget=None if budget is None else min(budget, num_nodes),
        max_nodes=min(most, num_nodes),
        exactness=exactness,
        source=source,
        warnings=tuple(warnings),
        ranker=ranker,
    )


def longest_chain(window: int) -> int:
    """Return how many drafts a window has at most: each knows a position more, and the last one leaves one masked."""
    return min(window - 1, MAX_NODES)


def _chain_settings(config: SpiffyConfig, window: int) -> SpiffySettings:
    """Return the settings of drafts of a window, which are a chain: each step unmasks a position of it at least."""
    for name, given in (("draft_graph", config.draft_graph), ("ranker", config.ranker)):
        if given not in (DEFAULT_GRAPH, None):
            raise ConfigError(
                f"{_NAME}.{name} is {reprlib.repr(given)}, but the drafts of this model are a chain that follows the "
                "entropies of its window, which no file describes; allowed is none; remove it, and give "
                f"{_NAME}.budget or {_NAME}.max_nodes for the number of drafts"
            )
    graph, source = DraftGraph.chain(longest_chain(window)), f"the chain of a window of {window}"
    return replace(_settings(config, graph, "exact", source, ()), is_chain=True)


def _exactness(config: SpiffyConfig, server: DllmConfig) -> Exactness:
    """Return whether a node's forward is what the decoder would compute: the context must not depend on the block."""
    if server.kv_policy == "prefix":
        reason = "kv_policy is 'prefix', which computes the K/V behind the block from the block's tokens at every step"
    elif server.kv_policy in DELAYED:
        reason = (
            f"kv_policy is {server.kv_policy!r}, under which K/V depend on the step in which a token was unmasked, so "
            "on the drafts"
        )
    elif server.refresh_every not in (None, 1):
        reason = f"refresh_every is {server.refresh_every}, which computes all K/V anew within a block, from its tokens"
    else:
        return "exact"
    if config.exactness == "exact":
        raise ConfigError(
            f"{_NAME}.exactness is 'exact', but additional_config.dllm.{reason}; drafts share these K/V with the true "
            "block, so that their forwards are not those of the decoder; allowed is kv_policy 'dual' without "
            f"refresh_every or with 1, 'freecache' and 'vicinity'; set one or ask for {_NAME}.exactness 'near'"
        )
    return "near"
