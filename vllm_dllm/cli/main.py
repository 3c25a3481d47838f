"""The program `vllm-dllm`; the other files of this package are its commands."""

import sys
from typing import Annotated

import typer

from vllm_dllm import __version__
from vllm_dllm.cli import bench, graph
from vllm_dllm.cli.calibrate import calibrate
from vllm_dllm.cli.console import print_error, print_line
from vllm_dllm.cli.doctor import doctor
from vllm_dllm.cli.studio import studio
from vllm_dllm.errors import ConfigError

app = typer.Typer(
    no_args_is_help=True,
    help="Tools of vllm-dllm.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(calibrate)
app.command()(doctor)
app.command()(studio)
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


def main() -> None:
    """Run the command of `sys.argv`; what the user can mend ends as one line and exit status 2."""
    try:
        app(prog_name="vllm-dllm")
    except ConfigError as error:
        print_error(error)
        sys.exit(2)
