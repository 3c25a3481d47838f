"""`vllm-dllm calibrate`: make a draft graph for a model."""

import datetime
import importlib.metadata
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from vllm_dllm import __version__
from vllm_dllm.calibrate.prompts import Prompts, read_prompts
from vllm_dllm.calibrate.select import Objective
from vllm_dllm.cli.calibrate_ranker import check_ranker_file, train
from vllm_dllm.cli.console import counted, waiting_for
from vllm_dllm.cli.inputs import Dtype, check_file, check_picture
from vllm_dllm.cli.server_settings import (
    AlgTemp,
    BlockLength,
    Credit,
    EntropyBound,
    Factor,
    Parameters,
    Policy,
    StepsPerBlock,
    Threshold,
    check_gen_length,
    given_parameters,
    given_settings,
    num_positions,
    server_settings,
)
from vllm_dllm.config import DllmConfig
from vllm_dllm.draft.graph import MAX_NODES, DraftGraph
from vllm_dllm.draft.graph_file import GraphFile, save_graph
from vllm_dllm.draft.graph_schema import PromptsFile, Provenance, Versions
from vllm_dllm.draft.picture import draw_graph, title_of
from vllm_dllm.draft.ranker_file import RankerFile, save_ranker
from vllm_dllm.errors import ConfigError

if TYPE_CHECKING:  # torch and vLLM are loaded when the command runs
    from vllm_dllm.calibrate.build import Prediction
    from vllm_dllm.calibrate.record import TraceFile
    from vllm_dllm.calibrate.trace import PromptTrace
    from vllm_dllm.draft.ranker import OrderRanker
    from vllm_dllm.engine.recording import ModelFacts

DEFAULT_GEN_LENGTH = 256
"""Positions that a prompt generates in a model that has twice as many."""

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


def calibrate(  # noqa: PLR0913 - the options of a command
    model: Annotated[str, typer.Argument(help="Name or path of the model.")],
    prompts: Annotated[Path, typer.Option(help="JSON lines with text, prompt, question or messages.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The graph file to write.")],
    samples: Annotated[int, typer.Option(min=2, help="Prompts to decode, from the file's beginning.")] = 50,
    policy: Policy = None,
    threshold: Threshold = None,
    factor: Factor = None,
    entropy_bound: EntropyBound = None,
    credit: Credit = None,
    alg_temp: AlgTemp = None,
    steps_per_block: StepsPerBlock = None,
    parameter: Parameters = None,
    block_length: BlockLength = None,
    gen_length: Annotated[int | None, typer.Option(min=1, help="Positions of each; 256 or half the model's.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0, help="Of the requests.")] = 0.0,
    nodes: Annotated[int, typer.Option(min=1, max=MAX_NODES, help="Nodes of the graph, at most.")] = 32,
    objective: Annotated[
        Objective,
        typer.Option(help="Choose nodes by what each adds, or by counts: its own, its parents', all ancestors'."),
    ] = "gain",
    budgets: Annotated[str, typer.Option(help="Budgets to report, with commas between them.")] = "1,3,5,8,10",
    held_out: Annotated[float, typer.Option(min=0.01, max=0.99, help="Share of the prompts to measure with.")] = 0.25,
    seed: Annotated[int, typer.Option(min=0, help="Of the split and of the noise.")] = 0,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 8,
    dtype: Annotated[Dtype, typer.Option(help="Of the engine.")] = "auto",
    kv_cache_memory_bytes: Annotated[
        int | None, typer.Option(min=1, help="Of the engine; as much as --concurrency needs unless given.")
    ] = None,
    ranker: Annotated[
        Path | None, typer.Option(help="Also train an order ranker into this .safetensors file, for the same server.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="Also draw the graph into this .svg or .png file.")] = None,
    keep_traces: Annotated[bool, typer.Option("--keep-traces", help="Keep the traces file when done.")] = False,
) -> None:
    """Decode prompts without drafts, choose the guesses that would have been right, and say what they save.

    Interrupt it at will: the same command goes on where it was.
    """
    given = given_settings(policy, block_length, threshold, factor, entropy_bound, credit, alg_temp, steps_per_block)
    plan = Plan(
        model=model,
        prompts=read_prompts(prompts, samples),
        output=output,
        picture=picture,
        ranker=ranker,
        settings=server_settings(model, given | given_parameters(parameter)),
        gen_length=gen_length or DEFAULT_GEN_LENGTH,
        temperature=temperature,
        num_nodes=nodes,
        objective=objective,
        budgets=_budgets(budgets, nodes),
        held_out=held_out,
        seed=seed,
        concurrency=concurrency,
        dtype=dtype,
        kv_cache_memory_bytes=kv_cache_memory_bytes,
    )
    _check(plan)
    _run(_fitted(plan, is_default=gen_length is None), keep_traces)


@dataclass(frozen=True, slots=True)
class Plan:
    """The options of a calibration, checked."""

    model: str
    prompts: Prompts
    output: Path
    picture: Path | None
    ranker: Path | None
    settings: DllmConfig
    gen_length: int
    temperature: float
    num_nodes: int
    objective: Objective
    budgets: tuple[int, ...]
    held_out: float
    seed: int
    concurrency: int
    dtype: str
    kv_cache_memory_bytes: int | None

    @property
    def trace_settings(self) -> dict[str, object]:
        """Everything that decides the traces."""
        return {
            "model": self.model,
            "prompts (SHA-256)": self.prompts.sha256,
            "samples": len(self.prompts.conversations),
            "gen-length": self.gen_length,
            "temperature": self.temperature,
            "seed": self.seed,
            "dtype": self.dtype,
            **self.settings.model_dump(mode="json", exclude={"attention"}),  # which changes no token
        }


def _check(plan: Plan) -> None:
    """Check what can be checked before an engine starts. Raises: ConfigError."""
    if plan.settings.has_windows:
        raise ConfigError(
            f"{plan.model} decodes windows that slide, whose drafts are a chain that no file describes, so there is "
            """nothing to calibrate; serve it with --speculative-config '{"method": "spiffy"}'"""
        )
    check_file("--output", plan.output)
    if plan.picture is not None:
        check_picture("--picture", plan.picture)
    if plan.ranker is not None:
        check_ranker_file(plan.ranker, plan.output, plan.settings)
    if len(plan.prompts.conversations) < 2:
        raise ConfigError(f"{plan.prompts.path} has one prompt; give two or more, since some of them are held out")


def _budgets(text: str, num_nodes: int) -> tuple[int, ...]:
    budgets = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if not all(1 <= budget <= MAX_NODES for budget in budgets):
        raise ConfigError(
            f"--budgets is {text!r}; allowed are whole numbers from 1 to {MAX_NODES} with commas between them; give "
            "for example 3,5,8"
        )
    return tuple(sorted({min(budget, num_nodes) for budget in budgets}))


def _fitted(plan: Plan, *, is_default: bool) -> Plan:
    """Check that the model has room for what is generated, or make a default fit. Raises: ConfigError."""
    with waiting_for("reading the model's configuration"):
        positions = num_positions(plan.model)
    if is_default:
        plan = replace(plan, gen_length=min(plan.gen_length, max(1, positions // 2)))
    # No prompt is shorter than a token; how long each is shows when it is encoded.
    check_gen_length(plan.gen_length, [1], plan.settings, positions)
    return plan


def _run(plan: Plan, keep_traces: bool) -> None:
    from vllm_dllm.calibrate.record import TraceFile

    path = plan.output.with_name(plan.output.name + ".traces")
    with TraceFile(path, plan.trace_settings) as trace_file:
        try:
            facts = _decode(plan, trace_file)
        except KeyboardInterrupt:
            done, all_prompts = len(trace_file.traces), len(plan.prompts.conversations)
            text = f"stopped after {done} of {all_prompts} prompts; the same command goes on from there"
            Console(stderr=True).print(Text(text, style="yellow"), soft_wrap=True)
            raise typer.Exit(INTERRUPTED) from None
        graph, prediction, ranker = _build(plan, facts, list(trace_file.traces.values()))
        _write(plan, facts, graph, prediction, ranker)
        if not keep_traces:
            trace_file.remove()


def _decode(plan: Plan, trace_file: "TraceFile") -> "ModelFacts":
    """Decode the prompts whose traces are missing."""
    # The steps are observed in the engine, so it has to be in this process. vLLM reads this when it is imported.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    with waiting_for("importing vLLM, which takes up to a minute"):
        from vllm_dllm.engine.recording import EngineOptions, RecordingEngine

    options = EngineOptions(
        model=plan.model,
        settings=plan.settings,
        gen_length=plan.gen_length,
        concurrency=plan.concurrency,
        dtype=plan.dtype,
        kv_cache_memory_bytes=plan.kv_cache_memory_bytes,
    )
    Console(stderr=True).print(Text(f"starting an engine of {plan.model}; its log follows"), soft_wrap=True)
    engine = RecordingEngine(options, plan.prompts.conversations)
    try:
        missing = [i for i in range(len(engine.prompts)) if i not in trace_file.traces]
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as progress:
            completed = len(engine.prompts) - len(missing)
            task = progress.add_task("prompts", total=len(engine.prompts), completed=completed)
            for trace in engine.decode(missing, plan.temperature, plan.seed):
                trace_file.append(trace)
                progress.advance(task)
    finally:
        engine.close()
    return engine.facts


def _build(
    plan: Plan, facts: "ModelFacts", traces: Sequence["PromptTrace"]
) -> tuple[DraftGraph, "Prediction", "OrderRanker | None"]:
    from vllm_dllm.calibrate.build import make_graph, predict, split, try_token_weights
    from vllm_dllm.calibrate.count import Decoding

    is_random = plan.settings.policy == "random"
    decoding = Decoding(facts.mask_token_id, plan.temperature, is_random, rules=facts.rules)
    by_prompt = sorted(traces, key=lambda trace: trace.prompt_idx)
    used, held_out = ([by_prompt[i] for i in indices] for indices in split(len(by_prompt), plan.held_out, plan.seed))
    if plan.ranker is not None:
        decoding = replace(decoding, ranker=train(used, held_out, decoding, plan.settings, plan.seed))
    graph = make_graph(used, decoding, plan.settings, plan.num_nodes, plan.objective)
    trial = try_token_weights(
        graph, used, held_out, decoding, plan.settings, plan.budgets, plan.num_nodes, plan.objective
    )
    if trial is not None:
        graph = trial.graph if trial.helps else graph
        text = (
            f"token weights: {trial.with_weights:.2f} forwards per generation held out, mean of the budgets, "
            f"{trial.without:.2f} without: {'kept' if trial.helps else 'left out'}"
        )
        Console().print(Text(text), soft_wrap=True)
    return graph, predict(graph, held_out, decoding, facts.eos_token_id, plan.budgets), decoding.ranker


def _write(
    plan: Plan, facts: "ModelFacts", graph: DraftGraph, prediction: "Prediction", ranker: "OrderRanker | None"
) -> None:
    import torch

    most = prediction.whole[max(prediction.whole)]
    generations = prediction.num_prompts
    provenance = Provenance(
        model=Path(plan.model).name if Path(plan.model).exists() else plan.model,
        family=facts.family,
        shape=facts.shape,
        settings=plan.settings,
        temperature=plan.temperature,
        prompts=(
            PromptsFile(
                file=plan.prompts.path.name, sha256=plan.prompts.sha256, num_prompts=len(plan.prompts.conversations)
            ),
        ),
        acceptance_by_depth=most.acceptance,
        predicted_nfe={0: most.without / generations}
        | {budget: forwards.with_drafts / generations for budget, forwards in prediction.whole.items()},
        seed=plan.seed,
        versions=Versions(vllm_dllm=__version__, vllm=importlib.metadata.version("vllm"), torch=str(torch.__version__)),
        date=datetime.datetime.now(tz=datetime.UTC).date(),
    )
    # What is written is whole: an interruption leaves the old file or none.
    temporary = plan.output.with_name(plan.output.name + ".new")
    save_graph(GraphFile(graph, provenance), temporary)
    temporary.replace(plan.output)
    if plan.ranker is not None and ranker is not None:
        save_ranker(RankerFile(ranker.weights, graph.readiness, provenance), plan.ranker)
    if plan.picture is not None:
        draw_graph(graph, plan.picture, title_of(GraphFile(graph, provenance)))
    console = Console()
    console.print(_table(prediction))
    console.print(
        Text(f"{plan.output}: {counted(len(graph), 'node')} of {counted(graph.num_anchors, 'state')}"), soft_wrap=True
    )


def _table(prediction: "Prediction") -> Table:
    """Show what each budget saves on the prompts that were held out."""
    table = Table(
        title=f"{counted(prediction.num_prompts, 'prompt')} held out: forwards per generation, refreshes included"
    )
    for name in ("budget", "without", "with", "ratio", "ratio to EOS", "accepted by depth"):
        table.add_column(name, justify="left" if "depth" in name else "right")
    for budget, forwards in prediction.whole.items():
        table.add_row(
            str(budget),
            f"{forwards.without / prediction.num_prompts:.1f}",
            f"{forwards.with_drafts / prediction.num_prompts:.1f}",
            f"{forwards.ratio:.2f}",
            f"{prediction.until_eos[budget].ratio:.2f}",
            " ".join(f"{share:.2f}" for share in forwards.acceptance),
        )
    table.caption = "no draft saves a block's first forward"
    return table
