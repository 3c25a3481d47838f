"""`vllm-dllm graph`: look at draft graphs, check them and merge them."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_dllm.cli.console import counted, examples, print_error, print_line
from vllm_dllm.cli.inputs import check_file, check_picture, family_for, read_config
from vllm_dllm.cli.server_settings import (
    AlgTemp,
    Credit,
    EntropyBound,
    Factor,
    Parameters,
    Policy,
    StepsPerBlock,
    Threshold,
    given_parameters,
    given_settings,
    settings_of,
)
from vllm_dllm.config import DllmConfig, parse_server_settings
from vllm_dllm.draft.graph import MAX_NODES, DraftGraph, formula_text
from vllm_dllm.draft.graph_file import GraphFile, check_fit, load_graph, save_graph
from vllm_dllm.draft.graph_schema import ModelShape, Provenance
from vllm_dllm.draft.merge import merge_graphs
from vllm_dllm.draft.picture import draw_graph, title_of
from vllm_dllm.errors import ConfigError

app = typer.Typer(no_args_is_help=True, help="Look at draft graphs, check them and merge them.")

_File = Annotated[Path, typer.Argument(metavar="FILE", help="A draft graph, as `vllm-dllm calibrate` writes it.")]


@app.command(epilog=examples("vllm-dllm graph show graph.json --picture graph.svg"))
def show(
    file: _File,
    picture: Annotated[Path | None, typer.Option(help="Also draw the graph into this .svg or .png file.")] = None,
) -> None:
    """Show a graph's nodes, how often they were a true future state, and where the counts come from."""
    if picture is not None:
        check_picture("--picture", picture)
    graph_file = load_graph(file)
    console = Console()
    console.print(_node_table(graph_file.graph))
    if graph_file.provenance is not None:
        console.print(_provenance_table(graph_file.provenance))
    if picture is not None:
        draw_graph(graph_file.graph, picture, title_of(graph_file))
        print_line(f"picture: {picture}")


@app.command(epilog=examples("vllm-dllm graph check graph.json --model GSAI-ML/LLaDA-8B-Instruct --policy threshold"))
def check(  # noqa: PLR0913 - the options of a command
    file: _File,
    model: Annotated[str | None, typer.Option(help="Name or path of the model to be served.")] = None,
    block_length: Annotated[int | None, typer.Option(help="Of the server.")] = None,
    policy: Policy = None,
    threshold: Threshold = None,
    factor: Factor = None,
    entropy_bound: EntropyBound = None,
    credit: Credit = None,
    alg_temp: AlgTemp = None,
    steps_per_block: StepsPerBlock = None,
    parameter: Parameters = None,
) -> None:
    """Check a graph, alone or for a server, by what the server goes by; warnings are those of its start.

    What is not given is as the model publishes it, and without --model as in the calibration.

    The exit status is 1 for a graph that cannot be used, and 0 for one that can, even where it was calibrated for
    something else and a warning says so.
    """
    given = given_settings(policy, block_length, threshold, factor, entropy_bound, credit, alg_temp, steps_per_block)
    given |= given_parameters(parameter)
    config = None if model is None else read_config(model)
    family = None if model is None or config is None else family_for(model, config)
    try:
        graph_file = load_graph(file)
        if config is None or family is None:
            warnings = check_fit(graph_file, _server_settings(graph_file, given), where=str(file))
        else:
            settings = settings_of(config, family, given)
            shape = ModelShape.of(config)
            warnings = check_fit(
                graph_file, settings, where=str(file), model=model, family=family.model_type, shape=shape
            )
    except ConfigError as error:
        print_error(error, "vllm-dllm graph check")
        raise typer.Exit(1) from None
    for warning in warnings:
        print_line(warning, "yellow")
    print_line(f"{file}: {counted(len(graph_file.graph), 'node')}, {counted(len(warnings), 'warning')}")


def _server_settings(graph_file: GraphFile, given: dict[str, object]) -> DllmConfig:
    if graph_file.provenance is not None:
        return parse_server_settings(graph_file.provenance.settings.model_dump() | given, prefix="--")
    # Any block length serves where none is known.
    return parse_server_settings({"block_length": 1024} | given, prefix="--")


@app.command(epilog=examples("vllm-dllm graph merge gsm8k.json code.json --output both.json --nodes 10"))
def merge(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Graphs of one model and the same settings.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")],
    nodes: Annotated[int, typer.Option(min=1, max=MAX_NODES, help="Nodes to keep, the most frequent ones.")] = 10,
) -> None:
    """Add up the counts of calibrations with different prompts."""
    check_file("--output", output)
    merged = merge_graphs([(str(file), load_graph(file)) for file in files], nodes)
    save_graph(merged, output)
    print_line(f"{output}: {counted(len(merged.graph), 'node')}, {counted(merged.graph.num_anchors, 'state')}")


def _node_table(graph: DraftGraph) -> Table:
    tokens = "any number of tokens" if graph.tokens_per_step is None else counted(graph.tokens_per_step, "token")
    table = Table(title=f"{counted(len(graph), 'node')}, best first; {tokens} per step")
    for name in ("node", "formula", "depth", "parents", "count", "share"):
        table.add_column(name, justify="left" if name in {"formula", "parents"} else "right")
    counts: list[int | None] = list(graph.counts or [None] * len(graph))
    for node, formula in enumerate(graph.formulas, start=1):
        count = counts[node - 1]
        table.add_row(
            str(node),
            Text(formula_text(formula)),
            str(graph.depths[node - 1]),
            " ".join("root" if parent == 0 else str(parent) for parent in graph.parents[node - 1]),
            "" if count is None else f"{count:,}",
            "" if count is None or not graph.num_anchors else f"{count / graph.num_anchors:.1%}",
        )
    if graph.counts is not None:
        table.caption = f"share of {counted(graph.num_anchors, 'state')}"
    return table


def _provenance_table(provenance: Provenance) -> Table:
    table = Table(title="calibration", show_header=False)
    for name, value in provenance.model_dump(mode="json", exclude={"settings", "versions", "prompts"}).items():
        if value is not None:
            table.add_row(name, Text(_value_text(value)))
    for prompts in provenance.prompts:
        table.add_row("prompts", Text(f"{prompts.num_prompts} of {prompts.file}, SHA-256 {prompts.sha256}"))
    for group in (provenance.settings, provenance.versions):
        for name, value in group.model_dump(exclude_none=True).items():
            table.add_row(name, Text(str(value)))
    return table


def _value_text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_value_text(entry)}" for key, entry in value.items())
    if isinstance(value, list):
        return ", ".join(map(_value_text, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)
