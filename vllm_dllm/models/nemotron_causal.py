"""Nemotron-Labs-Diffusion as the autoregressive model that its weights are, too: vLLM's own Ministral, under its names.

Nothing of diffusion is in here: scheduling, sampling, prefix caching and the rest are vLLM's.
"""

from collections.abc import Iterable

from torch import Tensor
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper

from vllm_dllm.models.checkpoint_tensors import TensorCount, embedding_name, head_name, needed_tensors


class NemotronLabsDiffusionForCausalLM(MistralForCausalLM):
    """The checkpoint with ordinary causal attention, mode `ar`."""

    hf_to_vllm_mapper = MistralForCausalLM.hf_to_vllm_mapper | WeightsMapper(
        orig_to_new_prefix={"encoder.": "model.", "diffusion_head.": "lm_head."}
    )

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a checkpoint's tensors; returns the names of the parameters they filled.

        Raises: ConfigError for tensors that are missing, unknown, doubled or of another shape, of one that is not
            quantised.
        """
        is_tied = self.config.tie_word_embeddings
        count = TensorCount(
            needed_tensors(self.config) if self.quant_config is None else {},
            tied=(head_name(self.config), embedding_name(self.config)) if is_tied else None,
            is_open=self.quant_config is not None,
        )
        loaded: set[str] = AutoWeightsLoader(self).load_weights(count.passing(weights), mapper=self.hf_to_vllm_mapper)
        return loaded
