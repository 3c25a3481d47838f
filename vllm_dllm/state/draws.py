"""How the tokens of a step's rows are drawn, where any request has a temperature above 0.

`torch_draws` states it in tensor code; the op `row_draws` does the same in one launch.
"""

import logging
from collections.abc import Callable

import torch

from vllm_dllm import ops
from vllm_dllm.errors import KernelUnavailable
from vllm_dllm.ops.vocab_stats import RowSampling
from vllm_dllm.state.canvas import Blocks, CanvasState
from vllm_dllm.unmask.walk import Nodes

logger = logging.getLogger("vllm.dllm")

Draw = Callable[[CanvasState, Blocks, Nodes], RowSampling]


def torch_draws(state: CanvasState, blocks: Blocks, nodes: Nodes) -> RowSampling:
    """Say how the rows of the evaluated canvases are sampled, in the order of canvases, positions.

    Args:
        state: what the requests asked for.
        blocks: of the requests.
        nodes: their canvases; a look-ahead's next root is in the block behind.
    """
    start = blocks.start[:, None].repeat(1, nodes.depth.shape[1])
    if nodes.end is not None:
        start[:, -1] += state.block_length
    slots = blocks.slots[:, None].expand_as(start)
    evaluated = map(nodes.per_evaluated, (slots, start, nodes.is_masked.sum(2)))
    return state.row_sampling(blocks.slots_np, *evaluated)


def native_draws(state: CanvasState, blocks: Blocks, nodes: Nodes) -> RowSampling:
    """Do what `torch_draws` does, in one launch; all tensors are contiguous."""
    requests = (blocks.slots, blocks.start)
    temperature, top_k, top_p, keys = ops.row_draws(
        requests, nodes.is_masked, nodes.place, state.draw_params, nodes.end is not None
    )
    return RowSampling(temperature, top_k, top_p, keys, state.has_filter(blocks.slots_np), state.wants_sampled)


def choose_draws(device: torch.device) -> Draw:
    """Take the native op where it is built for the device, else its torch twin."""
    try:
        ops.require("row_draws", device.type)
    except KernelUnavailable as error:
        logger.warning("Draws are made ready by torch: %s", error)
        return torch_draws
    logger.info("Draws are made ready by a native op for %s.", device.type)
    return native_draws
