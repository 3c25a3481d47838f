"""The program `vllm-dllm`; the other files of this package are its commands."""

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from vllm_dllm import __version__
from vllm_dllm.cli import bench, graph
from vllm_dllm.cli.calibrate import calibrate
from vllm_dllm.cli.console import examples, print_error, print_line
from vllm_dllm.cli.doctor import doctor
from vllm_dllm.cli.studio import studio
from vllm_dllm.errors import ConfigError

app = typer.Typer(
    no_args_is_help=True,
    help="Tools of vllm-dllm.",
    epilog=examples(
        "vllm-dllm doctor",
        "vllm-dllm calibrate GSAI-ML/LLaDA-8B-Instruct --prompts prompts.jsonl -o graph.json",
        "vllm-dllm --install-completion",
    ),
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(
    epilog=examples(
        "vllm-dllm calibrate GSAI-ML/LLaDA-8B-Instruct --prompts prompts.jsonl -o graph.json",
        "vllm-dllm calibrate MODEL --prompts prompts.jsonl -o graph.json --policy threshold --threshold 0.9",
        "vllm-dllm calibrate MODEL --prompts prompts.jsonl -o graph.json --gen-length 128 --samples 100 --keep-traces",
    )
)(calibrate)
app.command(epilog=examples("vllm-dllm doctor", "vllm-dllm doctor --self-test"))(doctor)
app.command(
    epilog=examples(
        "vllm-dllm studio --server http://localhost:8000",
        'vllm-dllm studio --server http://localhost:8000 --prompt "What is 17 * 23?" --save run.html',
    )
)(studio)
app.add_typer(graph.app, name="graph")
app.add_typer(bench.app, name="bench")


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print_line(f"vllm-dllm {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Show the version and end.")
    ] = False,
) -> None:
    """Take the options of the program itself."""


def _command(words: Sequence[str]) -> str:
    """Return the command that words begin with, as far as it exists."""
    found, names = typer.main.get_command(app), ["vllm-dllm"]
    for word in words:
        if (command := getattr(found, "commands", {}).get(word)) is None:
            break
        found = command
        names.append(word)
    return " ".join(names)


def main() -> None:
    """Run the command of `sys.argv`; what the user can mend ends as one line, what to run next, and exit status 2."""
    try:
        app(prog_name="vllm-dllm")
    except ConfigError as error:
        print_error(error, _command(sys.argv[1:]))
        sys.exit(2)
