"""Nemotron-Labs-Diffusion for vLLM: the shared layers under its names."""

from vllm.model_executor.models.utils import WeightsMapper

from vllm_dllm.models.transformer import MaskedDiffusionLM


class NemotronLabsDiffusionModel(MaskedDiffusionLM):
    """Nemotron-Labs-Diffusion 3B, 8B and 14B and models of the same layers in other sizes."""

    hf_to_vllm_mapper = MaskedDiffusionLM.hf_to_vllm_mapper | WeightsMapper(
        orig_to_new_prefix={"encoder.": "model.", "diffusion_head.": "lm_head."}
    )
