"""Measure a LLaDA checkpoint on this machine and print the tables of docs/benchmarks.md."""

import argparse
import json
import os
import platform
from pathlib import Path

import torch

from vllm_dllm.bench.report import table
from vllm_dllm.config import DllmConfig

TINY = Path(__file__).parents[2] / "examples" / "tiny_llada"


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m vllm_dllm.bench", description=__doc__)
    parser.add_argument("--model", type=Path, default=TINY / "checkpoint", help="a LLaDA checkpoint (default: tiny)")
    parser.add_argument(
        "--prompts",
        type=Path,
        default=TINY / "questions.jsonl",
        help="JSONL, each line with the field `question` (default: questions of the tiny model)",
    )
    parser.add_argument("--skip-prompts", type=int, default=0, help="lines left out at the beginning (default: 0)")
    parser.add_argument("--num-prompts", type=int, default=16, help="prompts that all decoders decode (default: 16)")
    parser.add_argument("--gen-length", type=int, default=128, help="tokens per prompt (default: 128)")
    parser.add_argument("--block-length", type=int, default=DllmConfig().block_length, help="default: 32")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16], help="default: 1 4 16")
    return parser.parse_args()


def machine() -> str:
    """Describe the machine in a line."""
    name = platform.processor() or platform.machine()
    with open("/proc/cpuinfo") as cpuinfo:
        models = [line.partition(": ")[2].strip() for line in cpuinfo if line.startswith("model name")]
    return f"{models[0] if models else name}, {os.cpu_count()} cores, torch {torch.__version__}"


def main() -> None:
    """Run all measurements and print them as Markdown."""
    args = parse_args()
    # The stages of a step are seen from inside the process; vLLM reads this when an engine is made.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm_dllm.bench.decode import compare
    from vllm_dllm.bench.stages import stage_times

    with args.prompts.open() as lines:
        questions = [json.loads(line)["question"] for line in lines]
    questions = questions[args.skip_prompts :][: args.num_prompts]
    rows = compare(args, questions)
    print(f"machine: {machine()}\n")
    print(
        f"{len(questions)} prompts, {args.gen_length} tokens each in blocks of {args.block_length}, fp32; "
        "the reference decodes them one after another\n"
    )
    print(table(rows))
    print("\nmilliseconds per denoising step, by stage (self time):\n")
    print(table(stage_times(args, questions)))


if __name__ == "__main__":
    main()
