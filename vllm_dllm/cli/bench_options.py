"""Options that describe a workload to measure, and what they become."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.models import OptionInfo

from vllm_dllm.cli.console import waiting_for
from vllm_dllm.cli.server_settings import check_gen_length, num_positions, option_of, server_settings
from vllm_dllm.config import DllmConfig
from vllm_dllm.draft.graph import MAX_NODES
from vllm_dllm.draft.graph_file import check_fit, load_graph
from vllm_dllm.draft.ranker_file import load_ranker
from vllm_dllm.errors import ConfigError
from vllm_dllm.kv_settings import WINDOW_RULE, WINDOW_SETTINGS
from vllm_dllm.policy_options import policy_settings
from vllm_dllm.spiffy_config import DEFAULT_GRAPH, longest_chain

if TYPE_CHECKING:
    from vllm_dllm.calibrate.prompts import Tokenizer
    from vllm_dllm.measure.decode import Policy
    from vllm_dllm.measure.workload import Workload

DEFAULT_POLICY, DEFAULT_BUDGETS, DEFAULT_CHAIN = "static", "1,3,5", "3"

Model = Annotated[str, typer.Option(help="Name or path of the model.")]
Prompts = Annotated[Path, typer.Option(help="JSONL file; each line has text, prompt, question or messages.")]
SkipPrompts = Annotated[int, typer.Option(min=0, help="Lines left out at the beginning.")]
NumPrompts = Annotated[int, typer.Option(min=1, help="Prompts that everyone decodes.")]
GenLength = Annotated[int, typer.Option(min=1, help="Tokens per prompt.")]
Concurrency = Annotated[str, typer.Option(metavar="N,...", help="Requests in flight; each number is measured.")]


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
    server = _server_of(model, settings)
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


def whole_numbers(option: str, text: str, most: int, of: str = "") -> tuple[int, ...]:
    """Read a list like `1,4,16`; an empty text is none.

    Args:
        option, text: its name, and what was given.
        most: the largest number; 0: no number is allowed.
        of: for the message, what has so many at most.
    """
    words = text.split(",") if text else []
    if not all(word.isdecimal() and 1 <= int(word) <= most for word in words):
        like = ",".join(str(number) for number in (1, 4, 16) if number <= most)
        allowed = f"are lists of whole numbers 1..{most} like {like}" if most else "is '' alone, which is none"
        raise ConfigError(f"{option} is {text!r}, allowed{of and f' for {of}'} {allowed}; correct it")
    return tuple(map(int, words))


def policy_option(default: str) -> OptionInfo:
    """Return the option `--policy`, whose default models with windows do without."""
    help = "Unmasking policies; each is measured. Models whose windows slide (WeDLM) have none."
    option: OptionInfo = typer.Option(metavar="NAME,...", show_default=default, help=help)
    return option


def fixed_budgets(
    model: str, settings: Mapping[str, object], budgets: str | None, chain: str | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Read the fixed budgets of draft graphs, and those of chain graphs.

    Args:
        model: name or path.
        settings: fields of `DllmConfig`.
        budgets, chain: the options; None is the default: of windows no chain graphs, and of the budgets those that
            their chain is long enough for.

    Raises: ConfigError for numbers that are not allowed.
    """
    server = _server_of(model, settings)
    most, windows = MAX_NODES, ""
    if server.has_windows:
        _check_windows(model, {"--chain": chain or None}, {})
        most, windows, chain = longest_chain(server.block_length), f"windows of {server.block_length}", ""
    of_chain = whole_numbers("--chain", DEFAULT_CHAIN if chain is None else chain, MAX_NODES)
    if budgets is None:
        usual = whole_numbers("--budgets", DEFAULT_BUDGETS, MAX_NODES)
        return tuple(budget for budget in usual if budget <= most), of_chain
    return whole_numbers("--budgets", budgets, most, windows), of_chain


def policies(
    model: str,
    policy: str | None,
    graph: str,
    settings: Mapping[str, object],
    ranker: str = "",
    default: str = DEFAULT_POLICY,
) -> "tuple[Policy, ...]":
    """Pair each policy with its graph and ranker, and with those of the settings that it reads.

    Args:
        model: name or path. One with windows has a rule, which is no policy.
        policy: names, with commas between them; None: `default`.
        graph: one for all of them, or one for each.
        settings: fields of `DllmConfig`.
        ranker: as `graph`; an empty text is none.
        default: where no policy is given.

    Raises: ConfigError for what is not allowed.
    """
    from vllm_dllm.measure.decode import Policy

    if _server_of(model, settings).has_windows:
        own = {"--policy": policy, "--graph": None if graph == DEFAULT_GRAPH else graph, "--ranker": ranker or None}
        _check_windows(model, own, settings)
        return (Policy(server_settings(model, settings).model_dump(include={*WINDOW_RULE})),)
    names = (default if policy is None else policy).split(",")
    graphs, rankers = graph.split(","), ranker.split(",")
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


def check_blocks(model: str, why: str) -> None:
    """Check that a model has blocks. Raises: ConfigError for one with windows, with the reason why."""
    if server_settings(model, {}).has_windows:
        raise ConfigError(
            f"--model is {model!r}, which decodes windows that slide, but {why}; allowed are models with blocks; give "
            "one of these, or measure this one by `vllm-dllm bench decode`"
        )


def _server_of(model: str, settings: Mapping[str, object]) -> DllmConfig:
    """Return what a model publishes, but for the block length."""
    return server_settings(model, {name: value for name, value in settings.items() if name == "block_length"})


def _check_windows(model: str, options: Mapping[str, object], settings: Mapping[str, object]) -> None:
    """Check that nothing is asked of a model with windows that it does not have.

    Args:
        model: for the message.
        options: values by option, of those that are no settings; None is not given.
        settings: fields of `DllmConfig`.

    Raises: ConfigError.
    """
    given = [(option, value) for option, value in options.items() if value is not None]
    given += [(option_of(name), value) for name, value in settings.items() if name not in WINDOW_SETTINGS]
    if given:
        option = given[0][0]
        values = ",".join(str(value) for name, value in given if name == option)
        raise ConfigError(
            f"{option} is {values!r}, but windows that slide, as {model} has, are decided by their entropies "
            "(--entropy-bound, --block-length), and their drafts are chains (--budgets); allowed is none; remove it"
        )
