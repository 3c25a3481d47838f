"""Small random models: their logits are far apart enough for decoding to have an order."""

from collections.abc import Callable

import pytest
import torch

from vllm_dllm.reference.model import LLaDA, LLaDAConfig

MakeModel = Callable[..., LLaDA]


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
        model = LLaDA(LLaDAConfig(**(values | changes)))
        for weight in model.parameters():
            torch.nn.init.normal_(weight, mean=float(weight.dim() == 1), std=0.3)
        return model.eval()

    return make


@pytest.fixture
def model(make_model: MakeModel) -> LLaDA:
    return make_model()
