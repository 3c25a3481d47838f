"""Nemotron-Labs-Diffusion for vLLM: the shared layers under its names, and the adapter of its drafts."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models.utils import WeightsMapper

from vllm_dllm.additional_config import mode_in
from vllm_dllm.models.draft_adapter import DraftAdapter, DraftRows, find_adapter
from vllm_dllm.models.transformer import MaskedDiffusionLM

if TYPE_CHECKING:
    from vllm_dllm.engine.model_state import DllmModelState


class NemotronLabsDiffusionModel(MaskedDiffusionLM):
    """Nemotron-Labs-Diffusion 3B, 8B and 14B and models of the same layers in other sizes."""

    hf_to_vllm_mapper = MaskedDiffusionLM.hf_to_vllm_mapper | WeightsMapper(
        orig_to_new_prefix={"encoder.": "model.", "diffusion_head.": "lm_head."}
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.is_self_speculative = mode_in(vllm_config.additional_config) == "self_speculation"
        self.drafts = DraftRows()
        self.adapter = find_adapter(vllm_config, "o_proj") if self.is_self_speculative else None
        if self.adapter is not None:
            for index, layer in enumerate(self._layers):
                name = f"model.layers.{index}.draft_adapter"
                layer.draft_adapter = DraftAdapter(layer.self_attn.o_proj, self.adapter, self.drafts, name)

    @property
    def _layers(self) -> Iterable[Any]:
        return self.model.layers

    def get_model_state_cls(self) -> "type[DllmModelState]":  # type: ignore[override]  # asked of the model
        """Name the class that drives decoding; vLLM's runner asks for it."""
        from vllm_dllm.engine.window_state import WindowModelState

        return WindowModelState if self.is_self_speculative else super().get_model_state_cls()

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: None = None,
        draft_rows: Tensor | None = None,
    ) -> Tensor:
        """Return hidden rows as other families do; `draft_rows` [num_drafts] int64 take the adapter, None: no row."""
        self.drafts.rows = draft_rows
        return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a checkpoint's tensors, and its adapter's; returns the names of the parameters they filled.

        Raises: as for other families, and ConfigError for those of the adapter.
        """
        loaded = super().load_weights(weights)
        if self.adapter is None:
            return loaded
        modules = [f"encoder.layers.{index}.self_attn.o_proj" for index in range(self.config.num_hidden_layers)]
        width, query = self.config.hidden_size, self.config.num_attention_heads * self.config.head_dim
        rank = self.adapter.rank
        tensors = self.adapter.tensors(modules, {"A": (rank, query), "B": (width, rank)})
        for layer, module in zip(self._layers, modules, strict=True):
            layer.draft_adapter.load(*tensors[module])
        return loaded | {name for name, _ in self.named_parameters() if ".draft_adapter." in name}
