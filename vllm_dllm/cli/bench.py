"""`vllm-dllm bench`: measure an engine on this machine; benchmarks/ in the repository measures its parts."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from vllm_dllm.cli import bench_options
from vllm_dllm.cli.bench_options import (
    Concurrency,
    GenLength,
    Model,
    NumPrompts,
    Prompts,
    SkipPrompts,
)
from vllm_dllm.cli.console import examples, print_line
from vllm_dllm.cli.inputs import Dtype, check_matplotlib, make_folder
from vllm_dllm.cli.server_settings import (
    AlgTemp,
    BlockLength,
    Credit,
    EntropyBound,
    Factor,
    Parameters,
    StepsPerBlock,
    Threshold,
    given_parameters,
    given_settings,
)

if TYPE_CHECKING:
    from vllm_dllm.measure.decode import Comparison, Runs
    from vllm_dllm.measure.report import Section

app = typer.Typer(no_args_is_help=True, help="Measure an engine on this machine; figures are ratios within one run.")

_FILE_WIDTH = 160

_Graphs = Annotated[
    str,
    typer.Option(metavar="FILE,...", help="Draft graph of all policies, or of each; `default` is each policy's own."),
]
_Budgets = Annotated[
    str | None,
    typer.Option(
        metavar="N,...",
        show_default=bench_options.DEFAULT_BUDGETS,
        help="Fixed budgets beside `off` and `auto`; '' is none. Windows have the default's below their length.",
    ),
]
_Chain = Annotated[
    str | None,
    typer.Option(
        metavar="N,...",
        show_default=bench_options.DEFAULT_CHAIN,
        help="Fixed budgets of a chain graph (FreeDave, SSD); '' is none. Windows (WeDLM) have chains by --budgets.",
    ),
]
_Rankers = Annotated[
    str,
    typer.Option(metavar="FILE,...", help="Order ranker of all policies, or of each: `auto` with it is measured too."),
]
_Starts = Annotated[
    int, typer.Option(min=1, help="Starts of all engines, each with --repeats rounds: two of one kind differ a little.")
]
_Waves = Annotated[
    int | None,
    typer.Option(min=1, help="Prompts of a round for each request in flight, others in the next; all unless given."),
]
_Policies = Annotated[str | None, bench_options.policy_option(bench_options.DEFAULT_POLICY)]
_Dtype = Annotated[
    Dtype, typer.Option(help="With bfloat16 near ties may round differently with drafts, which is exit status 1.")
]
_KvCacheMib = Annotated[
    int | None, typer.Option(min=1, help="K/V memory of each engine; as much as --concurrency needs unless given.")
]


@app.command(
    epilog=examples(
        "vllm-dllm bench decode --model GSAI-ML/LLaDA-8B-Instruct --prompts prompts.jsonl --graph graph.json",
        "vllm-dllm bench decode --model MODEL --prompts prompts.jsonl --policy static,threshold --chain ''",
    )
)
def decode(  # noqa: PLR0913 - the options of a command
    model: Model,
    prompts: Prompts,
    skip_prompts: SkipPrompts = 0,
    num_prompts: NumPrompts = 16,
    gen_length: GenLength = 128,
    block_length: BlockLength = None,
    concurrency: Concurrency = "1,4,16",
    policy: _Policies = None,
    threshold: Threshold = None,
    factor: Factor = None,
    entropy_bound: EntropyBound = None,
    credit: Credit = None,
    alg_temp: AlgTemp = None,
    steps_per_block: StepsPerBlock = None,
    parameter: Parameters = None,
    graph: _Graphs = "default",
    budgets: _Budgets = None,
    chain: _Chain = None,
    ranker: _Rankers = "",
    repeats: Annotated[int, typer.Option(min=1, help="Rounds.")] = 3,
    starts: _Starts = 1,
    waves: _Waves = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of all requests.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the first prompt; the next has one more.")] = 0,
    stop_at_eos: Annotated[bool, typer.Option(help="End at EOS, not after --gen-length tokens.")] = False,
    dtype: _Dtype = "float32",
    kv_cache_mib: _KvCacheMib = None,
    out: Annotated[Path, typer.Option(help="Folder for decode.md, decode.json and decode.svg.")] = Path("build/bench"),
) -> None:
    """Measure speculation against none, everyone in turns; the exit status is 1 when tokens differ.

    Four engines are alive at once, each with the model's weights: off, auto, one for all fixed budgets and one for the
    chains. Where memory is short, --chain '' and --budgets '' leave out the last two.
    """
    check_matplotlib()
    make_folder("--out", out)
    from vllm_dllm.measure.decode import Comparison, sections

    given = given_settings(None, block_length, threshold, factor, entropy_bound, credit, alg_temp, steps_per_block)
    given |= given_parameters(parameter)
    of_graph, of_chain = bench_options.fixed_budgets(model, given, budgets, chain)
    comparison = Comparison(
        policies=bench_options.policies(model, policy, graph, given, ranker),
        budgets=of_graph,
        chain=of_chain,
        repeats=repeats,
        starts=starts,
        waves=waves,
        dtype=dtype,
        workload=replace(  # last, since it reads the tokenizer
            bench_options.workload(model, prompts, skip_prompts, num_prompts, gen_length, given, concurrency),
            temperature=temperature,
            seed=seed,
            stop_at_eos=stop_at_eos,
            kv_cache_mib=kv_cache_mib,
        ),
    )
    runs = _compare(comparison)
    _report(out, comparison, runs, sections(runs, starts))


def _compare(comparison: "Comparison") -> "Runs":
    """Measure under a progress bar."""
    from vllm_dllm.measure.decode import compare, num_measurements
    from vllm_dllm.measure.process import EngineEndedError
    from vllm_dllm.measure.workload import UnequalTokensError

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=num_measurements(comparison))

        def advance(what: str) -> None:
            progress.update(task, description=what, advance=1)

        try:
            return compare(comparison, advance)
        except (UnequalTokensError, EngineEndedError) as error:
            fail(error)


def fail(error: RuntimeError) -> NoReturn:
    """End with exit status 1."""
    Console(stderr=True).print(Text(str(error), style="red"), soft_wrap=True)
    raise typer.Exit(1) from None


def print_sections(tables: "Sequence[Section]") -> None:
    """Write the machine and tables to stdout."""
    from vllm_dllm.measure.report import cell_text, machine

    console = Console()
    if not console.is_terminal:
        console = Console(width=_FILE_WIDTH)
    print_line(machine())
    for section in tables:
        table = Table(title=section.title, title_justify="left")
        for name, value in section.rows[0].items():
            table.add_column(name, justify="left" if isinstance(value, str) else "right")
        for row in section.rows:
            table.add_row(*map(cell_text, row.values()))
        console.print(table)


def _report(out: Path, comparison: "Comparison", runs: "Runs", tables: "Sequence[Section]") -> None:
    """Print the tables, and write them, everything that was measured, and the picture."""
    from vllm_dllm.measure.plot import draw
    from vllm_dllm.measure.report import machine, to_markdown

    print_sections(tables)
    content = {
        "machine": machine(),
        "comparison": asdict(comparison),
        "tables": [asdict(section) for section in tables],
        "runs": [
            {**asdict(key), "round": number, **measurement.as_json()}
            for key, measurements in runs.items()
            for number, measurement in enumerate(measurements)
        ],
    }
    (out / "decode.json").write_text(json.dumps(content) + "\n")
    (out / "decode.md").write_text(f"machine: {machine()}\n\n{to_markdown(tables)}")
    draw(tables, out / "decode.svg")
    print_line(f"written: {', '.join(str(out / f'decode.{suffix}') for suffix in ('md', 'json', 'svg'))}")
