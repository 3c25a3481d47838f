"""Measure the parts of the engine on this machine; figures are ratios within one run.

    python -m benchmarks reference|stages|modes|accuracy|kernels

`vllm-dllm bench decode`, which is in the package, measures speculation end to end.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress

from benchmarks.kernels.suite import SHORT, KernelBench, Sizes
from benchmarks.kernels.turns import UnequalResultsError
from vllm_dllm.cli import bench_options
from vllm_dllm.cli.bench import fail, print_sections
from vllm_dllm.cli.bench_options import (
    Concurrency,
    GenLength,
    Model,
    NumPrompts,
    Prompts,
    SkipPrompts,
)
from vllm_dllm.cli.console import print_error, print_line
from vllm_dllm.cli.inputs import check_file
from vllm_dllm.cli.server_settings import (
    AlgTemp,
    BlockLength,
    Credit,
    EntropyBound,
    Factor,
    StepsPerBlock,
    Threshold,
    given_settings,
    server_settings,
)
from vllm_dllm.errors import ConfigError
from vllm_dllm.measure.decode import Policy
from vllm_dllm.measure.report import machine, to_markdown
from vllm_dllm.measure.workload import UnequalTokensError, Workload
from vllm_dllm.spiffy_config import DEFAULT_GRAPH, read_speculative_config

app = typer.Typer(
    no_args_is_help=True,
    help="Measure the parts of the engine on this machine; figures are ratios within one run.",
    pretty_exceptions_enable=False,
)


def _measures_workload(policies: str) -> Callable[[Callable[[Workload, tuple[Policy, ...]], None]], None]:
    """Make a command of a function; its options say what workload and which policies the function is given.

    Args:
        policies: default of `--policy`.
    """

    def add(measure: Callable[[Workload, tuple[Policy, ...]], None]) -> None:
        @app.command(measure.__name__, help=measure.__doc__)
        def command(  # noqa: PLR0913 - the options of a command
            model: Model,
            prompts: Prompts,
            skip_prompts: SkipPrompts = 0,
            num_prompts: NumPrompts = 16,
            gen_length: GenLength = 128,
            block_length: BlockLength = None,
            concurrency: Concurrency = "1,4,16",
            policy: Annotated[str | None, bench_options.policy_option(policies)] = None,
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
            chosen = bench_options.policies(model, policy, DEFAULT_GRAPH, given, default=policies)
            measure(
                bench_options.workload(model, prompts, skip_prompts, num_prompts, gen_length, given, concurrency),
                chosen,
            )

    return add


@_measures_workload("static,threshold")
def reference(workload: Workload, policies: tuple[Policy, ...]) -> None:
    """Measure the engine beside the plain reference decoders; the exit status is 1 when tokens differ."""
    from benchmarks.reference import compare_with_reference

    try:
        print_sections(compare_with_reference(workload, policies))
    except UnequalTokensError as error:
        fail(error)


@_measures_workload("static")
def stages(workload: Workload, policies: tuple[Policy, ...]) -> None:
    """Measure where the time of a denoising step goes."""
    from benchmarks.stages import stage_times

    bench_options.check_blocks(workload.model, "stages are of the steps within a block")
    print_sections(stage_times(workload, policies))


@_measures_workload("threshold")
def modes(workload: Workload, policies: tuple[Policy, ...]) -> None:
    """Count the forwards of Nemotron's modes; the exit status is 1 when an adapter of drafts changes tokens."""
    from benchmarks.modes import compare_modes

    try:
        print_sections(compare_modes(workload, policies))
    except UnequalTokensError as error:
        fail(error)


@app.command()
def accuracy(  # noqa: PLR0913 - the options of a command
    model: Model,
    prompts: Annotated[Path, typer.Option(help="JSONL file; each line has question, and answer or task and given.")],
    skip_prompts: SkipPrompts = 0,
    num_prompts: NumPrompts = 16,
    gen_length: GenLength = 128,
    block_length: BlockLength = None,
    policy: Annotated[
        str, typer.Option(metavar="NAME,...|all", help="Unmasking policies, with their defaults.")
    ] = "all",
    settings: Annotated[str, typer.Option(metavar="JSON", help="Of the server: nets' files and others.")] = "{}",
    speculative_config: Annotated[
        str, typer.Option(metavar="JSON|FILE", help="Spiffy's; '' is without.")
    ] = '{"method": "spiffy"}',
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 16,
) -> None:
    """Count right replies beside forwards, under each policy; the exit status is 1 when drafts change a token."""
    from benchmarks.accuracy import chosen_policies, judge, read_lines, sections

    bench_options.check_blocks(model, "replies are judged under each policy")
    own = _json_object("--settings", settings)
    names, out = chosen_policies(policy, {**server_settings(model, own).parameters, **own})
    drafts = read_speculative_config(speculative_config) if speculative_config else None
    assert drafts is None or isinstance(drafts, dict), "what is no object is refused"
    of_block = {} if block_length is None else {"block_length": block_length}
    lines = read_lines(prompts, skip_prompts, num_prompts)
    workload = bench_options.workload(model, prompts, skip_prompts, num_prompts, gen_length, of_block, str(concurrency))
    try:
        print_sections(sections(judge(workload, lines, names, own, drafts), lines))
    except UnequalTokensError as error:
        fail(error)
    if out:
        print_line(f"left out, since their nets are not given, or the model has not their tokens: {', '.join(out)}")


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
    sizes = SHORT if short else Sizes()
    if repeats is not None:
        sizes = replace(sizes, num_rounds=repeats)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None)
        bench = KernelBench(sizes, _device(device), lambda what: progress.update(task, description=what))
        try:
            tables = list(bench.sections())
        except UnequalResultsError as error:
            fail(error)
    print_sections(tables)
    if out is not None:
        out.write_text(f"machine: {machine()}\n\n{to_markdown(tables)}")


def _json_object(option: str, text: str) -> dict[str, object]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ConfigError(f"{option} is {text!r}, allowed are JSON objects like '{{}}'; correct it")
    return value


def _device(name: str) -> torch.device:
    has_gpu = torch.cuda.is_available()
    allowed = {"cpu": "cpu", "auto": "cuda" if has_gpu else "cpu"} | ({"cuda": "cuda"} if has_gpu else {})
    if name not in allowed:
        raise ConfigError(f"--device is {name!r}, this machine allows {', '.join(allowed)}; choose one of these")
    return torch.device(allowed[name])


def main() -> None:
    """Run the command of `sys.argv`; what the user can mend ends as one line and exit status 2."""
    try:
        app(prog_name="python -m benchmarks")
    except ConfigError as error:
        print_error(error, "python -m benchmarks")
        sys.exit(2)


if __name__ == "__main__":
    main()
