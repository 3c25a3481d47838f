"""Lines for the terminal, whole however narrow it is."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.text import Text

from vllm_dllm.errors import ConfigError


def print_line(text: str, style: str = "") -> None:
    """Write a line to stdout, in a style of rich."""
    Console().print(Text(text, style=style), soft_wrap=True)


def counted(number: int, what: str) -> str:
    """Write a number of things, `what` being one of them."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def print_error(error: ConfigError, command: str) -> None:
    """Write what the user can mend to stderr, and what to run next: what the error says, or the help of the command."""
    console = Console(stderr=True)
    console.print(Text(str(error), style="red"), soft_wrap=True)
    console.print(Text(f"next: {error.command or f'{command} --help'}"), soft_wrap=True)


def examples(*commands: str) -> str:
    """Return the end of a command's help."""
    return "\n\n".join(("Examples:", *commands))


@contextmanager
def waiting_for(what: str) -> Iterator[None]:
    """Say on stderr what takes long: as long as it takes on a terminal, as a line elsewhere."""
    console = Console(stderr=True)
    if console.is_terminal:
        with console.status(what):
            yield
    else:
        console.print(Text(f"{what} ..."), soft_wrap=True)
        yield
