"""The program `vllm-dllm`; the other files of this package are its commands."""

import sys

import typer

from vllm_dllm.cli import bench, graph
from vllm_dllm.cli.calibrate import calibrate
from vllm_dllm.cli.console import print_error
from vllm_dllm.cli.doctor import doctor
from vllm_dllm.errors import ConfigError

app = typer.Typer(no_args_is_help=True, help="Tools of vllm-dllm.", pretty_exceptions_enable=False)
app.command()(calibrate)
app.command()(doctor)
app.add_typer(graph.app, name="graph")
app.add_typer(bench.app, name="bench")


def main() -> None:
    """Run the command of `sys.argv`; what the user can mend ends as one line and exit status 2."""
    try:
        app()
    except ConfigError as error:
        print_error(error)
        sys.exit(2)
