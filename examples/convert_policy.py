"""Convert the published net of a policy, a .pth file, into the safetensors file that a server takes.

    python examples/convert_policy.py layer_2_flan.pth learn2pd.safetensors

Learn2PD (arXiv:2509.25188) publishes one net for each block length; serve it with
`--additional-config '{"dllm": {"block_length": 32, "policy": "learn2pd", "learn2pd_file": "learn2pd.safetensors"}}'`.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file

NAMES = ("linear1.weight", "linear1.bias", "linear2.weight", "linear2.bias")


def convert(source: Path, target: Path) -> None:
    """Write the tensors of a net as float32.

    Raises: ValueError where the file has other tensors.
    """
    loaded = torch.load(source, map_location="cpu", weights_only=True)
    tensors = {name.removeprefix("module."): its for name, its in loaded.items()}
    if set(tensors) != {*NAMES}:
        raise ValueError(
            f"{source} has the tensors {sorted(tensors)}, allowed are {sorted(NAMES)}; give Learn2PD's net"
        )
    save_file({name: its.float().contiguous() for name, its in tensors.items()}, target)


def main() -> None:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the published .pth file")
    parser.add_argument("target", type=Path, help="the .safetensors file to write")
    arguments = parser.parse_args()
    convert(arguments.source, arguments.target)


if __name__ == "__main__":
    main()
