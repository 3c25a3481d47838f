"""Small random models: their logits are far apart enough for decoding to have an order."""

from collections.abc import Callable

import pytest
import torch

from vllm_dllm.reference.model import LLaDA, LLaDAConfig
from vllm_dllm.reference.qwen import Qwen, QwenConfig

MakeModel = Callable[..., LLaDA]
MakeQwen = Callable[..., Qwen]


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    for name, weight in model.named_parameters():
        is_norm = weight.dim() == 1 and not name.endswith("bias")
        torch.nn.init.normal_(weight, mean=float(is_norm), std=0.3)
    return model.eval()


@pytest.fixture
def make_model() -> MakeModel:
    def make(**changes: object) -> LLaDA:
        values = {
            "d_model": 32,
            "n_layers": 3,
            "n_heads": 4,
            "n_kv_heads": 2,
            "mlp_hidden_size": 48,
            "vocab_size": 37,
            "embedding_size": 41,
            "mask_token_id": 3,
            "eos_token_id": 1,
            "max_sequence_length": 64,
        }
        return randomised(LLaDA(LLaDAConfig(**(values | changes))))

    return make


@pytest.fixture
def model(make_model: MakeModel) -> LLaDA:
    return make_model()


@pytest.fixture
def make_qwen() -> MakeQwen:
    def make(**changes: object) -> Qwen:
        values = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "vocab_size": 37,
            "mask_token_id": 3,
            "eos_token_id": 1,
            "rope_theta": 1e4,
            "max_position_embeddings": 64,
        }
        return randomised(Qwen(QwenConfig(**(values | changes))))

    return make


@pytest.fixture
def dream(make_qwen: MakeQwen) -> Qwen:
    return make_qwen(architecture="DreamModel")


@pytest.fixture
def sdar(make_qwen: MakeQwen) -> Qwen:
    return make_qwen(architecture="SDARForCausalLM")
