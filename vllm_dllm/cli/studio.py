"""`vllm-dllm studio`: a page that shows how a server denoises, or a recording of it in one file."""

import os
from pathlib import Path
from typing import Annotated

import typer

from vllm_dllm.cli.console import print_line
from vllm_dllm.cli.inputs import check_file
from vllm_dllm.errors import ConfigError
from vllm_dllm.studio.page import recorded_page
from vllm_dllm.studio.record import Question, record
from vllm_dllm.studio.serve import origin_of, page_server


def studio(
    server: Annotated[str, typer.Option(metavar="URL", help="A running `vllm serve` of one of our models.")] = (
        "http://127.0.0.1:8000"
    ),
    host: Annotated[
        str, typer.Option(help="Address or name of the page; 0.0.0.0: all addresses, no names.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of the page; 0 takes a free one.")] = 8808,
    save: Annotated[Path | None, typer.Option(metavar="FILE", help="Serve nothing; write a recording as HTML.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Of the recording.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of the recording.")] = 64,
) -> None:
    """Show how a running server denoises: positions as they unmask, drafts, with and without speculation side by side.

    With --save and --prompt nothing is served, and the page is written as one file that holds a recording; an API key
    is taken from OPENAI_API_KEY.
    """
    origin = origin_of(server)
    if (save is None) != (prompt is None):
        raise ConfigError("--save and --prompt go together: give both to write a recording, none for the page")
    if save is not None and prompt is not None:
        check_file("--save", save)
        made = record(origin, Question(prompt, max_tokens), os.environ.get("OPENAI_API_KEY"))
        save.write_text(recorded_page(made), "utf-8")
        print_line(f"recording: {save}")
        return
    try:
        page = page_server(origin, host, port)
    except OSError as error:
        raise ConfigError(
            f"the page cannot be served at --host {host} --port {port} ({error.strerror}); choose another --port"
        ) from None
    address = f"http://{host}:{page.server_port}"
    print_line(f"{address} shows {origin}; Ctrl+C ends it")
    with page:
        try:
            page.serve_forever()
        except KeyboardInterrupt:
            print_line("ended")
