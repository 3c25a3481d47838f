"""The part of `vllm-dllm calibrate` that trains an order ranker."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from vllm_dllm.cli.inputs import check_file
from vllm_dllm.config import DllmConfig
from vllm_dllm.errors import ConfigError

if TYPE_CHECKING:  # torch is loaded when the command runs
    from vllm_dllm.calibrate.count import Decoding
    from vllm_dllm.calibrate.trace import PromptTrace
    from vllm_dllm.draft.ranker import OrderRanker


def check_ranker_file(path: Path, output: Path, settings: DllmConfig) -> None:
    """Check the option `--ranker`. Raises: ConfigError."""
    if settings.policy == "random":
        raise ConfigError(
            "--ranker is given with policy 'random', whose order drafts know from its noise; leave --ranker out"
        )
    check_file("--ranker", path)
    if path.suffix != ".safetensors" or path.resolve() == output.resolve():
        raise ConfigError(f"--ranker is {path}, allowed are files whose names end in .safetensors; give another name")


def train(
    used: Sequence["PromptTrace"],
    held_out: Sequence["PromptTrace"],
    decoding: "Decoding",
    settings: DllmConfig,
    seed: int,
) -> "OrderRanker":
    """Train a ranker with a progress bar, and say what it is worth on the prompts that were held out.

    Raises: ConfigError where the traces have nothing to learn from.
    """
    from vllm_dllm.calibrate.build import tokens_per_step
    from vllm_dllm.calibrate.fit import fit_readiness
    from vllm_dllm.calibrate.train import EPOCHS, make_examples, next_share, train_ranker

    examples, others = (make_examples(traces, decoding.mask_token_id) for traces in (used, held_out))
    if examples is None or others is None:
        raise ConfigError(
            f"there is nothing to train a ranker from: with policy {settings.policy!r} and block_length "
            f"{settings.block_length} blocks are done in one step; use smaller steps, larger blocks, more prompts "
            "or no --ranker"
        )
    per_step = tokens_per_step(settings, decoding.rules)
    readiness = fit_readiness(used, decoding.mask_token_id, per_step)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("ranker", total=EPOCHS)
        ranker = train_ranker(
            examples,
            readiness,
            is_one_by_one=per_step == 1,
            seed=seed,
            on_epoch=lambda: progress.advance(task),
        )
    without, with_ranker = (next_share(others, readiness, each) for each in (None, ranker))
    text = f"the readiest position comes next at {without:.1%} of the held-out steps, {with_ranker:.1%} with the ranker"
    Console().print(Text(text), soft_wrap=True)
    return ranker
