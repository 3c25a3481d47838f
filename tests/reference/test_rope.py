"""The reference's rotary positions against transformers' own."""

import pytest
import torch
from torch.testing import assert_close
from transformers import Qwen2Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from vllm_dllm.reference.rope import Rope

DIM, POSITIONS = 16, 48
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 2.5},
        {"rope_type": "dynamic", "factor": 1.0},
        YARN,
        YARN | {"beta_fast": 4, "beta_slow": 0.5},
        YARN | {"truncate": False},
        YARN | {"attention_factor": 1.7},
        YARN | {"mscale": 0.7, "mscale_all_dim": 1.3},
        YARN | {"factor": 1.0},
    ],
    ids=str,
)
def test_frequencies_equal_transformers(scaling):
    config = Qwen2Config(
        hidden_size=4 * DIM,
        num_attention_heads=4,
        max_position_embeddings=POSITIONS,
        rope_parameters={"rope_theta": 5e4, **scaling},
    )
    longest = int(POSITIONS * scaling["factor"])
    frequencies, amplitude = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, "cpu", seq_len=longest)
    rope = Rope.of(5e4, scaling, POSITIONS)
    assert_close(rope.frequencies(DIM), frequencies, rtol=1e-6, atol=0)
    assert rope.amplitude == pytest.approx(amplitude)


def test_rotation_turns_pairs_by_position_and_scales_them():
    rope = Rope.of(100.0, YARN | {"attention_factor": 1.5}, POSITIONS)
    cos, sin = rope.rotation(torch.tensor([0, 7]), 4)
    angle = 7 * rope.frequencies(4)
    assert_close(cos, 1.5 * torch.stack((torch.ones(4), angle.cos().repeat(2))))
    assert_close(sin, 1.5 * torch.stack((torch.zeros(4), angle.sin().repeat(2))))


def test_the_base_is_read_where_it_stands():
    assert Rope.of(1e4, None, 8) == Rope(theta=1e4, max_positions=8)
    assert Rope.of(1e4, {"rope_type": "default", "rope_theta": 5.0}, 8).theta == 5.0
    with pytest.raises(ValueError, match="rope_type is 'llama3'; the reference has"):
        Rope.of(1e4, {"type": "llama3"}, 8)
