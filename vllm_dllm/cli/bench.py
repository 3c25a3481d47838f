"""`vllm-dllm bench`: measure an engine, or the native ops, on this machine."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from vllm_dllm.cli import bench_options
from vllm_dllm.cli.console import print_line
from vllm_dllm.cli.inputs import Dtype, check_file, check_matplotlib, make_folder
from vllm_dllm.cli.server_settings import (
    AlgTemp,
    BlockLength,
    Credit,
    EntropyBound,
    Factor,
    StepsPerBlock,
    Threshold,
    given_settings,
)
from vllm_dllm.draft.graph import MAX_NODES
from vllm_dllm.errors import ConfigError
from vllm_dllm.spiffy_config import DEFAULT_GRAPH

if TYPE_CHECKING:
    import torch

    from vllm_dllm.bench.decode import Comparison, Policy, Runs
    from vllm_dllm.bench.report import Section
    from vllm_dllm.bench.workload import Workload

app = typer.Typer(
    no_args_is_help=True, help="Measure an engine or the ops on this machine; figures are ratios within one run."
)

_FILE_WIDTH = 160

_Model = Annotated[str, typer.Option(help="Name or path of the model.")]
_Prompts = Annotated[Path, typer.Option(help="JSONL file; each line has text, prompt, question or messages.")]
_Skip = Annotated[int, typer.Option(min=0, help="Lines left out at the beginning.")]
_NumPrompts = Annotated[int, typer.Option(min=1, help="Prompts that everyone decodes.")]
_GenLength = Annotated[int, typer.Option(min=1, help="Tokens per prompt.")]
_Policies = Annotated[str, typer.Option(metavar="NAME,...", help="Unmasking policies; each is measured.")]
_Graphs = Annotated[
    str,
    typer.Option(metavar="FILE,...", help="Draft graph of all policies, or of each; `default` is each policy's own."),
]
_Budgets = Annotated[str, typer.Option(metavar="N,...", help="Fixed budgets beside `off` and `auto`; '' is none.")]
_Chain = Annotated[
    str, typer.Option(metavar="N,...", help="Fixed budgets of a chain graph (FreeDave, SSD); '' is none.")
]
_Concurrency = Annotated[str, typer.Option(metavar="N,...", help="Requests in flight; each number is measured.")]
_Dtype = Annotated[
    Dtype, typer.Option(help="With bfloat16 near ties may round differently with drafts, which is exit status 1.")
]
_KvCacheMib = Annotated[
    int | None, typer.Option(min=1, help="K/V memory of each engine; as much as --concurrency needs unless given.")
]


def _measures_workload(policies: str) -> Callable[[Callable[["Workload", "tuple[Policy, ...]"], None]], None]:
    """Make a command of a function; its options say what workload and which policies the function is given.

    Args:
        policies: default of `--policy`.
    """

    def add(measure: Callable[["Workload", "tuple[Policy, ...]"], None]) -> None:
        @app.command(measure.__name__, help=measure.__doc__)
        def command(  # noqa: PLR0913 - the options of a command
            model: _Model,
            prompts: _Prompts,
            skip_prompts: _Skip = 0,
            num_prompts: _NumPrompts = 16,
            gen_length: _GenLength = 128,
            block_length: BlockLength = None,
            concurrency: _Concurrency = "1,4,16",
            policy: _Policies = policies,
            threshold: Threshold = None,
            factor: Factor = None,
            entropy_bound: EntropyBound = None,
            credit: Credit = None,
            alg_temp: AlgTemp = None,
            steps_per_block: StepsPerBlock = None,
        ) -> None:
            given = given_settings(
                None, block_length, threshold, factor, entropy_bound, credit, alg_temp, steps_per_block
            )
            chosen = bench_options.policies(model, policy, DEFAULT_GRAPH, given)
            measure(
                bench_options.workload(model, prompts, skip_prompts, num_prompts, gen_length, given, concurrency),
                chosen,
            )

    return add


@_measures_workload("static,threshold")
def reference(workload: "Workload", policies: "tuple[Policy, ...]") -> None:
    """Measure the engine beside the plain reference decoders; the exit status is 1 when tokens differ."""
    from vllm_dllm.bench.reference import compare_with_reference
    from vllm_dllm.bench.workload import UnequalTokensError

    try:
        _print(compare_with_reference(workload, policies))
    except UnequalTokensError as error:
        _fail(error)


@_measures_workload("static")
def stages(workload: "Workload", policies: "tuple[Policy, ...]") -> None:
    """Measure where the time of a denoising step goes."""
    from vllm_dllm.bench.stages import stage_times

    _print(stage_times(workload, policies))


@app.command()
def decode(  # noqa: PLR0913 - the options of a command
    model: _Model,
    prompts: _Prompts,
    skip_prompts: _Skip = 0,
    num_prompts: _NumPrompts = 16,
    gen_length: _GenLength = 128,
    block_length: BlockLength = None,
    concurrency: _Concurrency = "1,4,16",
    policy: _Policies = "static",
    threshold: Threshold = None,
    factor: Factor = None,
    entropy_bound: EntropyBound = None,
    credit: Credit = None,
    alg_temp: AlgTemp = None,
    steps_per_block: StepsPerBlock = None,
    graph: _Graphs = "default",
    budgets: _Budgets = "1,3,5",
    chain: _Chain = "3",
    repeats: Annotated[int, typer.Option(min=1, help="Rounds.")] = 3,
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
    from vllm_dllm.bench.decode import Comparison, sections

    given = given_settings(None, block_length, threshold, factor, entropy_bound, credit, alg_temp, steps_per_block)
    comparison = Comparison(
        policies=bench_options.policies(model, policy, graph, given),
        budgets=bench_options.whole_numbers("--budgets", budgets, MAX_NODES),
        chain=bench_options.whole_numbers("--chain", chain, MAX_NODES),
        repeats=repeats,
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
    tables = sections(runs, comparison.workload.block_length)
    _print(tables)
    _write(out, comparison, runs, tables)


@app.command()
def kernels(
    short: Annotated[bool, typer.Option("--short", help="A few sizes, some seconds.")] = False,
    device: Annotated[str, typer.Option(metavar="cpu|cuda|auto", help="`auto` is a GPU if there is one.")] = "auto",
    repeats: Annotated[int | None, typer.Option(min=1, help="Rounds.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the tables into this Markdown file.")] = None,
) -> None:
    """Measure the native ops against torch, vLLM and the machine; the exit status is 1 when results differ.

    Needs no model. `x floor` is the time over the least that memory and arithmetic of the machine allow, measured
    before; ratios to others say how many times as long they take.
    """
    if out is not None:
        check_file("--out", out)
    from vllm_dllm.bench.kernels import SHORT, KernelBench, Sizes
    from vllm_dllm.bench.report import machine, to_markdown
    from vllm_dllm.bench.turns import UnequalResultsError

    sizes = SHORT if short else Sizes()
    if repeats is not None:
        sizes = replace(sizes, num_rounds=repeats)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None)
        bench = KernelBench(sizes, _device(device), lambda what: progress.update(task, description=what))
        try:
            tables = list(bench.sections())
        except UnequalResultsError as error:
            _fail(error)
    _print(tables)
    if out is not None:
        out.write_text(f"machine: {machine()}\n\n{to_markdown(tables)}")


def _device(name: str) -> "torch.device":
    import torch

    has_gpu = torch.cuda.is_available()
    allowed = {"cpu": "cpu", "auto": "cuda" if has_gpu else "cpu"} | ({"cuda": "cuda"} if has_gpu else {})
    if name not in allowed:
        raise ConfigError(f"--device is {name!r}, this machine allows {', '.join(allowed)}; choose one of these")
    return torch.device(allowed[name])


def _compare(comparison: "Comparison") -> "Runs":
    """Measure under a progress bar."""
    from vllm_dllm.bench.decode import compare, num_measurements
    from vllm_dllm.bench.process import EngineEndedError
    from vllm_dllm.bench.workload import UnequalTokensError

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=num_measurements(comparison))

        def advance(what: str) -> None:
            progress.update(task, description=what, advance=1)

        try:
            return compare(comparison, advance)
        except (UnequalTokensError, EngineEndedError) as error:
            _fail(error)


def _fail(error: RuntimeError) -> NoReturn:
    """End with exit status 1."""
    Console(stderr=True).print(Text(str(error), style="red"), soft_wrap=True)
    raise typer.Exit(1) from None


def _print(tables: "Sequence[Section]") -> None:
    from vllm_dllm.bench.report import cell_text, machine

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


def _write(out: Path, comparison: "Comparison", runs: "Runs", tables: "Sequence[Section]") -> None:
    """Write the tables, everything that was measured, and the picture."""
    from vllm_dllm.bench.plot import draw
    from vllm_dllm.bench.report import machine, to_markdown

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
