"""SDAR-MoE for vLLM (arXiv:2510.06303): the shared layers, under names that some files cut short."""

import re
from collections.abc import Iterable

from torch import Tensor
from vllm.model_executor.models.utils import WeightsMapper

from vllm_dllm.models.transformer import MaskedDiffusionLM

_CUT = re.compile(r"^(?=(?:layers|embed_tokens|norm)\.)")
"""Where `model.` is missing."""


class SDARMoeForCausalLM(MaskedDiffusionLM):
    """SDAR-30B-A3B-Chat, SDAR-30B-A3B-Sci and models of the same layers in other sizes."""

    hf_to_vllm_mapper = MaskedDiffusionLM.hf_to_vllm_mapper | WeightsMapper(orig_to_new_regex={_CUT: "model."})

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a checkpoint's tensors, whose names may lack `model.`; as `MaskedDiffusionLM.load_weights`."""
        return super().load_weights((_CUT.sub("model.", name), tensor) for name, tensor in weights)
