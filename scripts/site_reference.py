"""The reference of the site, made from what is checked: fields of settings, commands, docstrings."""

import re
from inspect import getdoc

import typer
from pydantic import BaseModel
from typer.cli import get_docs_for_click

from vllm_dllm.cli.main import app
from vllm_dllm.config import REQUEST_PREFIX, DllmConfig, RequestOptions
from vllm_dllm.spiffy_config import SpiffyConfig
from vllm_dllm.unmask.registry import parameters

PYTHON = ("vllm_dllm.policy", "vllm_dllm.config", "vllm_dllm.spiffy_config", "vllm_dllm.noise", "vllm_dllm.likelihood")
"""Modules whose docstrings are shown."""


def meanings(model: type[BaseModel]) -> dict[str, str]:
    """Return what the docstring of a model says of its fields."""
    attributes = (getdoc(model) or "").partition("Attributes:\n")[2]
    entries = re.findall(r"^    ([a-z_, ]+): (.*?)(?=^    \S|\Z)", attributes, re.MULTILINE | re.DOTALL)
    return {name: " ".join(text.split()) for names, text in entries for name in names.split(", ")}


def cell(text: object) -> str:
    """Return a text as a cell of a table."""
    return str(text).replace("|", "\\|")


def table(model: type[BaseModel], prefix: str = "", shared: dict[str, str] | None = None) -> str:
    """List the fields of a model with defaults, what is allowed, and what they mean.

    Raises: KeyError for a field that no docstring describes.
    """
    says = {**(shared or {}), **meanings(model)}
    rows = ["| field | default | allowed | meaning |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        inner = (getattr(each, "description", None) for each in field.metadata)
        allowed = field.description or next(filter(None, inner), None) or described(field.annotation)
        default = "" if field.is_required() else f"`{'null' if field.default is None else field.default}`"
        rows.append(f"| `{prefix}{name}` | {default} | {cell(allowed)} | {cell(says[name])} |")
    return "\n".join(rows)


def described(annotation: object) -> str:
    """Return the description within an annotation such as `Annotated[...] | None`, in whose place null is allowed."""
    for each in getattr(annotation, "__args__", ()):
        for extra in getattr(each, "__metadata__", ()):
            if text := getattr(extra, "description", None):
                return text if text.startswith("null") else f"null and {text}"
    return str(annotation)


def policy_parameters(prefix: str = "") -> str:
    """List the parameters of policies in torch code."""
    rows = ["| field | default | allowed | meaning |", "|---|---|---|---|"]
    for name, its in parameters().items():
        rows.append(f"| `{prefix}{name}` | `{its.default:g}` | {cell(its.allowed)} | {cell(its.says)} |")
    return "\n".join(rows)


def reference_pages() -> dict[str, str]:
    """Return the pages by name."""
    server = meanings(DllmConfig)
    torch_code = "\n\n## Parameters of policies\n\nOf those [in torch code](../policies.md#in-torch-code):\n\n"
    commands = get_docs_for_click(
        obj=typer.main.get_command(app),
        ctx=typer.Context(typer.main.get_command(app)),
        name="vllm-dllm",
        title="Commands",
    )
    return {
        "server": "# Settings of a server\n\nThe fields of `additional_config.dllm`. A family's published values take "
        "the place of these defaults ([settings](../configuration.md)).\n\n"
        + table(DllmConfig)
        + torch_code
        + policy_parameters(),
        "requests": "# Options of a request\n\nKeys of `extra_args`, over HTTP of `vllm_xargs`; null is the server's "
        "setting ([requests](../configuration.md#requests)).\n\n"
        + table(RequestOptions, REQUEST_PREFIX, server)
        + torch_code
        + policy_parameters(REQUEST_PREFIX),
        "speculative-config": "# Fields of `--speculative-config`\n\n[Ways to write it](../speculative-config.md).\n\n"
        + table(SpiffyConfig),
        "commands": commands,
        "python": "# Python\n\nWhat [a policy of your own](../add-a-policy.md) imports, and what checks settings.\n\n"
        + "\n\n".join(f"::: {module}" for module in PYTHON),
    }
