"""Which implementation makes the row statistics of a model: decided once, by what is built and what the LM head is."""

from typing import TYPE_CHECKING

import torch
import vllm.envs
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_gather
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from vllm_dllm import ops
from vllm_dllm.errors import KernelUnavailable
from vllm_dllm.unmask.head import EditedHead, Head, LogitsHead, MergedHead, WeightHead

if TYPE_CHECKING:
    from vllm_dllm.models.transformer import MaskedDiffusionLM

logger = init_logger("vllm.dllm")


def choose_head(
    model: "MaskedDiffusionLM", vocab_size: int, mask_token_id: int | None, device: torch.device
) -> EditedHead:
    """Choose the head of rows without edits, and make logits of those with edits."""
    own = _choose_own(model, vocab_size, mask_token_id, device)
    is_native = not isinstance(own, LogitsHead) or own.is_native
    return EditedHead(own, model.head_logits, vocab_size, mask_token_id, is_native=is_native)


def _choose_own(model: "MaskedDiffusionLM", vocab_size: int, mask_token_id: int | None, device: torch.device) -> Head:
    """Take the op on the LM head's weight, on its logits where the weight is not all there is to it, else torch.

    Each rank reduces its own part of the vocabulary; all of it only by torch, and where the vocabulary was extended.
    """
    keep_float32(model, device)
    try:
        ops.require("vocab_stats", device.type)
    except KernelUnavailable as error:
        logger.warning("Row statistics are made by torch: %s", error)
        return LogitsHead(model.head_logits, vocab_size, mask_token_id, is_native=False)
    whole = LogitsHead(model.head_logits, vocab_size, mask_token_id, is_native=True)
    num_ranks, indices = get_tensor_model_parallel_world_size(), model.lm_head.shard_indices
    first_id, num_ids = indices.org_vocab_start_index, indices.num_org_elements
    obstacle = _obstacle(model, device)
    own: Head
    if obstacle is None:
        logger.info("Row statistics are made by the native op for %s from the LM head's weight.", device.type)
        own = WeightHead(model.lm_head.weight.data[:num_ids], mask_token_id, first_id)
    else:
        logger.info("Row statistics are made by the native op for %s from logits, as %s.", device.type, obstacle)
        if num_ranks == 1 or indices.num_added_elements > 0:
            return whole

        def own_logits(hidden: Tensor) -> Tensor:
            return model.own_logits(hidden)[:, :num_ids]

        own = LogitsHead(own_logits, num_ids, mask_token_id, is_native=True, first_id=first_id)
    return own if num_ranks == 1 else MergedHead(own, whole, num_ranks, _all_gather)


def keep_float32(model: "MaskedDiffusionLM", device: torch.device) -> None:
    """Let vLLM's product of a plain LM head keep the float32 of its sums on a GPU, as if `head_dtype` were given.

    In bfloat16 logits near 20 lie 0.125 apart: ties, and with them the tokens, would change with the kernel that cuBLAS
    takes for the number of rows. On a CPU the op does not round either. A dtype that the user gave stays, and so does
    vLLM's batch-invariant product, which has none.
    """
    processor, head = model.logits_processor, model.lm_head
    is_plain = isinstance(head.quant_method, UnquantizedEmbeddingMethod | UnquantizedLinearMethod)
    is_given = processor.head_dtype not in (None, head.weight.dtype) if is_plain else True
    if device.type != "cuda" or is_given or vllm.envs.VLLM_BATCH_INVARIANT:
        return
    if head.weight.dtype in (torch.bfloat16, torch.float16):
        processor.head_dtype = torch.float32
        logger.info("The LM head's product of %s weights keeps its float32 sums.", head.weight.dtype)


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


def _all_gather(columns: Tensor) -> Tensor:
    """Gather float64 columns of all ranks as pairs of float32, since vLLM's collective on the CPU knows no float64."""
    gathered: Tensor = tensor_model_parallel_all_gather(columns.view(torch.float32))
    return gathered.view(torch.float64)
