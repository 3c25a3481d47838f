"""WeDLM for vLLM: the shared layers, decoded by windows that slide."""

from typing import TYPE_CHECKING

from vllm_dllm.models.transformer import MaskedDiffusionLM

if TYPE_CHECKING:
    from vllm_dllm.engine.model_state import DllmModelState


class WeDLMForCausalLM(MaskedDiffusionLM):
    """WeDLM 7B and 8B and models of the same layers in other sizes."""

    def get_model_state_cls(self) -> "type[DllmModelState]":  # type: ignore[override]  # asked of the model
        """Name the class that drives decoding; vLLM's runner asks for it."""
        from vllm_dllm.engine.sliding_state import SlidingModelState

        return SlidingModelState
