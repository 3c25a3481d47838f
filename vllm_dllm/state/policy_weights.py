"""The files of nets that policies look at."""

from pathlib import Path

import torch
from torch import Tensor

from vllm_dllm.errors import ConfigError
from vllm_dllm.unmask.registry import file_options, torch_policy


def load_weights(option: str, path: str, block_length: int, device: torch.device) -> dict[str, Tensor]:
    """Load the net that a policy looks at, as float64.

    Args:
        option: the setting that names the file.
        path: of the file.
        block_length: positions of a block, which the net's tensors depend on.
        device: of the tensors.

    Raises: ConfigError for a file that cannot be read, and for one with other tensors.
    """
    from safetensors import SafetensorError  # here, so that decoding is imported with torch alone
    from safetensors.torch import load_file

    shapes = torch_policy(file_options()[option][0]).weights
    assert shapes is not None, "the option is one of a policy with a net"
    wanted = dict(shapes(block_length))
    if not Path(path).is_file():
        raise ConfigError(
            f"{option} is {path!r}, which is no file; allowed are safetensors files; give the path of one"
        )
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{option} is {path!r}, which cannot be read ({error}); allowed are safetensors files; convert it with "
            "examples/convert_policy.py"
        ) from error
    given = {name: tuple(its.shape) for name, its in found.items()}
    if given != wanted:
        raise ConfigError(
            f"{option} is {path!r} with the tensors {given}, allowed for blocks of {block_length} are {wanted}; give "
            "the net that was trained for this block_length, or change that"
        )
    return {name: its.to(device, torch.float64) for name, its in found.items()}
