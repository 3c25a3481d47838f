"""Which implementation makes the row statistics of a model: decided once, by what is built and what the LM head is."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_gather
from vllm.logger import init_logger
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from vllm_dllm import ops
from vllm_dllm.errors import KernelUnavailable
from vllm_dllm.unmask.head import Head, LogitsHead, Shard, WeightHead

if TYPE_CHECKING:
    from vllm_dllm.models.transformer import MaskedDiffusionLM

logger = init_logger("vllm.dllm")


def choose_head(model: "MaskedDiffusionLM", vocab_size: int, mask_token_id: int, device: torch.device) -> Head:
    """Take the op on the LM head's weight, on its logits where the weight is not all there is to it, else torch."""
    try:
        ops.require("vocab_stats", device.type)
    except KernelUnavailable as error:
        logger.warning("Row statistics are made by torch: %s", error)
        return LogitsHead(model.head_logits, vocab_size, mask_token_id, is_native=False)
    by_logits = LogitsHead(model.head_logits, vocab_size, mask_token_id, is_native=True)
    obstacle = _obstacle(model, device)
    if obstacle is not None:
        logger.info("Row statistics are made by the native op for %s from logits, as %s.", device.type, obstacle)
        return by_logits
    logger.info("Row statistics are made by the native op for %s from the LM head's weight.", device.type)
    return WeightHead(_shard(model), by_logits, mask_token_id)


def _obstacle(model: "MaskedDiffusionLM", device: torch.device) -> str | None:
    """Return why the op does not make the product of the LM head itself; None if it can."""
    if device.type != "cpu":
        return "there the product is the GPU libraries'"
    head, processor = model.lm_head, model.logits_processor
    if not isinstance(head.quant_method, UnquantizedEmbeddingMethod):
        return f"the LM head is quantised by {type(head.quant_method).__name__}"
    if head.bias is not None:
        return "the LM head has a bias"
    if processor.scale != 1.0 or processor.soft_cap is not None:
        return "the logits are scaled or capped"
    if head.shard_indices.num_added_elements > 0:
        return "the vocabulary was extended"
    return None


def _shard(model: "MaskedDiffusionLM") -> Shard:
    """Return this rank's rows of the weight, without those that pad it."""
    indices = model.lm_head.shard_indices
    return Shard(
        weight=model.lm_head.weight.data[: indices.num_org_elements],
        first_id=indices.org_vocab_start_index,
        num_shards=get_tensor_model_parallel_world_size(),
        gather=_all_gather,
    )


def _all_gather(columns: Tensor) -> Tensor:
    """Gather float64 columns of all ranks as pairs of float32, since vLLM's collective on the CPU knows no float64."""
    gathered: Tensor = tensor_model_parallel_all_gather(columns.view(torch.float32))
    return gathered.view(torch.float64)
