"""Auto against none in alternating rounds of real engines, one thread each: medians with 95 % of their bootstrap.

    python -m benchmarks.budget.rounds MODEL... --prompts GSM8K.jsonl --out build/rounds

14 (SDAR) to 26 (LLaDA) minutes for 8.5 M parameters on an idle machine; `rounds.json` has all that was measured.
"""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from vllm_dllm.cli import bench_options
from vllm_dllm.cli.bench_options import Concurrency, GenLength, Prompts, SkipPrompts
from vllm_dllm.cli.console import print_line
from vllm_dllm.cli.server_settings import server_settings
from vllm_dllm.measure.decode import Comparison, Runs, compare, num_measurements, sections
from vllm_dllm.measure.report import Row, Section, machine, to_markdown

BLOCK_LENGTHS = {True: 8, False: 32}
"""By whether a model is block-causal: those that the small models were trained with."""
THRESHOLD = 0.9
SHOWN = ("tokens/s", "drafts/forward", "accepted/forward")


def comparison_of(
    model: str, prompts: Path, skip_prompts: int, gen_length: int, concurrency: str, starts: int, repeats: int
) -> Comparison:
    """Return what is compared of a model: static, and the policy of its family that unmasks what it is sure of."""
    bench_options.check_blocks(model, "what is compared are policies")
    is_causal = server_settings(model, {}).is_block_causal
    settings: dict[str, object] = {"block_length": BLOCK_LENGTHS[is_causal], "threshold": THRESHOLD}
    most = max(bench_options.whole_numbers("--concurrency", concurrency, 1024), default=1)
    workload = bench_options.workload(model, prompts, skip_prompts, most, gen_length, settings, concurrency)
    policies = bench_options.policies(model, f"static,{'dynamic' if is_causal else 'threshold'}", "default", settings)
    return Comparison(workload, policies, budgets=(), chain=(), repeats=repeats, starts=starts, waves=1)


def shown(model: str, runs: Runs, comparison: Comparison) -> list[Row]:
    """Return the rows of auto."""
    speeds, *_, ratios = (each.rows for each in sections(runs, comparison.starts))
    of_auto = [row for row in speeds if row["drafts"] == "auto"]
    return [
        {
            "model": "/".join(Path(model).parts[-2:]),
            **{f"{name}, auto / off" if "tokens" in name else name: ratio[name] for name in ratio if name != "drafts"},
            **{name: speed[name] for name in SHOWN},
        }
        for speed, ratio in zip(of_auto, ratios, strict=True)
    ]


def main(
    models: Annotated[list[str], typer.Argument(help="Checkpoints.")],
    prompts: Prompts,
    skip_prompts: SkipPrompts = 200,
    gen_length: GenLength = 64,
    concurrency: Concurrency = "1,2,4,8,16",
    starts: Annotated[int, typer.Option(min=1, help="Of both engines.")] = 4,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds behind each start.")] = 4,
    out: Annotated[Path, typer.Option(help="Folder for rounds.json and rounds.md.")] = Path("build/rounds"),
) -> None:
    """Print auto / off, tokens per second and CPU time, of each model, policy and number of requests at once."""
    os.environ["OMP_NUM_THREADS"] = "1"  # of the engines, which are processes of their own
    out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    found = []
    for model in models:
        comparison = comparison_of(model, prompts, skip_prompts, gen_length, concurrency, starts, repeats)
        total, done = num_measurements(comparison), 0

        def advance(what: str, model: str = model, total: int = total) -> None:
            nonlocal done
            done += 1
            typer.echo(f"{done}/{total} {Path(model).name} {what}", err=True)

        runs = compare(comparison, advance)
        rows += shown(model, runs, comparison)
        kept = replace(comparison, workload=replace(comparison.workload, prompts=()))
        found.append(
            {
                "comparison": asdict(kept),
                "runs": [
                    {**asdict(key), "start": number // repeats, "round": number, **measurement.as_json()}
                    for key, measurements in runs.items()
                    for number, measurement in enumerate(measurements)
                ],
            }
        )
        (out / "rounds.json").write_text(json.dumps({"machine": machine(), "models": found, "rows": rows}, default=str))
    title = f"auto / off, one thread, {starts * repeats} rounds behind {starts} starts: median [95 % of its bootstrap]"
    text = f"{machine()}\n\n{to_markdown([Section(title, rows)])}"
    (out / "rounds.md").write_text(text)
    print_line(text)


if __name__ == "__main__":
    typer.run(main)
