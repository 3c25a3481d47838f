"""Options that describe a workload to measure, and what they become."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_dllm.cli.console import waiting_for
from vllm_dllm.cli.server_settings import check_gen_length, num_positions, server_settings
from vllm_dllm.draft.graph_file import check_fit, load_graph
from vllm_dllm.draft.ranker_file import load_ranker
from vllm_dllm.errors import ConfigError
from vllm_dllm.policy_options import policy_settings
from vllm_dllm.spiffy_config import DEFAULT_GRAPH

if TYPE_CHECKING:
    from vllm_dllm.calibrate.prompts import Tokenizer
    from vllm_dllm.measure.decode import Policy
    from vllm_dllm.measure.workload import Workload

Model = Annotated[str, typer.Option(help="Name or path of the model.")]
Prompts = Annotated[Path, typer.Option(help="JSONL file; each line has text, prompt, question or messages.")]
SkipPrompts = Annotated[int, typer.Option(min=0, help="Lines left out at the beginning.")]
NumPrompts = Annotated[int, typer.Option(min=1, help="Prompts that everyone decodes.")]
GenLength = Annotated[int, typer.Option(min=1, help="Tokens per prompt.")]
Concurrency = Annotated[str, typer.Option(metavar="N,...", help="Requests in flight; each number is measured.")]
PolicyNames = Annotated[str, typer.Option(metavar="NAME,...", help="Unmasking policies; each is measured.")]


def workload(
    model: str,
    prompts: Path,
    skip_prompts: int,
    num_prompts: int,
    gen_length: int,
    settings: Mapping[str, object],
    concurrency: str,
) -> "Workload":
    """Read the prompts and the model's block length.

    Args:
        settings: fields of `DllmConfig`.

    Raises: ConfigError when nothing is left to measure, and for a generation that the model has no room for.
    """
    from vllm_dllm.calibrate.prompts import encode, read_prompts
    from vllm_dllm.measure.workload import Workload

    at_once = whole_numbers("--concurrency", concurrency, 1024)
    chosen = read_prompts(prompts, skip_prompts + num_prompts).conversations[skip_prompts:]
    if not chosen or not at_once:
        raise ConfigError(
            f"--skip-prompts is {skip_prompts} and --concurrency is {concurrency!r}, which leaves nothing of {prompts} "
            "to measure; skip fewer prompts and give at least one number"
        )
    of_block = {name: value for name, value in settings.items() if name == "block_length"}
    server = server_settings(model, of_block)
    tokenizer, positions = _read_tokenizer(model)
    ids = tuple(tuple(encode(tokenizer, conversation)) for conversation in chosen)
    check_gen_length(gen_length, map(len, ids), server, positions)
    return Workload(model, ids, gen_length, server.block_length, at_once)


def _read_tokenizer(model: str) -> "tuple[Tokenizer, int]":
    """Return a model's tokenizer, and how many positions a sequence has at most, as vLLM sees it."""
    with waiting_for("reading the tokenizer"):
        from transformers import PreTrainedTokenizerFast

        try:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"the tokenizer of model {model!r} cannot be read ({reason}); give a checkpoint with one"
            ) from None
        return tokenizer, min(num_positions(model), tokenizer.model_max_length)


def whole_numbers(option: str, text: str, most: int) -> tuple[int, ...]:
    """Read a list like `1,4,16`; an empty text is none."""
    words = text.split(",") if text else []
    if not all(word.isdecimal() and 1 <= int(word) <= most for word in words):
        raise ConfigError(f"{option} is {text!r}, allowed are lists of whole numbers 1..{most} like 1,4,16; correct it")
    return tuple(map(int, words))


def policies(
    model: str, policy: str, graph: str, settings: Mapping[str, object], ranker: str = ""
) -> "tuple[Policy, ...]":
    """Pair each policy with its graph and ranker, and with those of the settings that it reads.

    Args:
        model: name or path.
        policy: names, with commas between them.
        graph: one for all of them, or one for each.
        settings: fields of `DllmConfig`.
        ranker: as `graph`; an empty text is none.

    Raises: ConfigError for what is not allowed.
    """
    from vllm_dllm.measure.decode import Policy

    names, graphs, rankers = policy.split(","), graph.split(","), ranker.split(",")
    for option, given in (("graph", graphs), ("ranker", rankers)):
        if len(given) not in {1, len(names)} or (len(given) > 1 and not all(given)):
            raise ConfigError(
                f"--{option} has {len(given)} {option}s and --policy {len(names)} policies; give one for all or one "
                "for each"
            )
    for path in filter(None, rankers):
        load_ranker(path)  # refused here, before engines start
    paired = []
    for index, name in enumerate(names):
        server = server_settings(model, {**settings, "policy": name})
        values = server.model_dump(include={"policy", *policy_settings(server.policy)}, exclude_none=True)
        path = graphs[index % len(graphs)]
        if path != DEFAULT_GRAPH:
            check_fit(load_graph(path, [DEFAULT_GRAPH]), server, where=path)  # refused here, before engines start
        paired.append(Policy(values, path, rankers[index % len(rankers)] or None))
    return tuple(paired)
