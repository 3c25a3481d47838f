"""The measurement of `scripts/gpu_check.sh`, for machines with torch alone.

    python -m benchmarks.kernels.gpu

Prints Markdown. `python -m benchmarks kernels` measures more, and needs the tools of the command line.
"""

import sys

import torch

from benchmarks.kernels.suite import KernelBench, Sizes
from vllm_dllm.measure.report import machine, to_markdown

SIZES = Sizes(
    dtypes=(torch.bfloat16,),
    contexts=(1024, 4096),
    block_lengths=(32,),
    at_once=(1, 16),
    vocab_sizes=(32000, 126464),
    hidden_sizes=(4096,),
)
"""Some two minutes, most of them for the compilation of flex_attention."""


def main() -> None:
    """Print each table as soon as it is measured."""
    device = torch.device("cuda")
    print(f"machine: {torch.cuda.get_device_name(device)}, {machine()}\n")
    bench = KernelBench(SIZES, device, lambda what: print(what, file=sys.stderr))
    for section in bench.sections():
        print(to_markdown([section]), flush=True)


if __name__ == "__main__":
    main()
