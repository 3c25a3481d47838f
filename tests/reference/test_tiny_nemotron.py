"""The trained Nemotron of the repository: its files are a checkpoint's, and both of its decoders answer."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import PreTrainedTokenizerFast

from vllm_dllm.models.checkpoint_tensors import needed_tensors
from vllm_dllm.models.nemotron_config import NemotronConfig
from vllm_dllm.reference.block_causal import generate, generate_causally
from vllm_dllm.reference.nemotron import Nemotron
from vllm_dllm.reference.policy import NEMOTRON, UnmaskPolicy

EXAMPLES = Path(__file__).parents[2] / "examples"
CHECKPOINT = EXAMPLES / "tiny_nemotron/checkpoint"
ADAPTER = CHECKPOINT / "linear_spec_lora"


def shapes(file: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(file, "pt") as tensors:
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118


def test_files_are_those_of_a_published_checkpoint() -> None:
    config = NemotronConfig(**json.loads((CHECKPOINT / "config.json").read_text()))
    assert shapes(CHECKPOINT / "model.safetensors") == needed_tensors(config)
    adapter = json.loads((ADAPTER / "adapter_config.json").read_text())
    assert (adapter["lora_alpha"] / adapter["r"], adapter["target_modules"]) == (4, ["o_proj"])
    inner = config.num_attention_heads * config.head_dim
    names = [f"base_model.model.encoder.layers.{i}.self_attn.o_proj" for i in range(config.num_hidden_layers)]
    down = {f"{name}.lora_A.weight": (adapter["r"], inner) for name in names}
    up = {f"{name}.lora_B.weight": (config.hidden_size, adapter["r"]) for name in names}
    assert shapes(ADAPTER / "adapter_model.safetensors") == down | up


@pytest.mark.parametrize("is_causal", [False, True])
def test_questions_are_answered(*, is_causal: bool) -> None:
    model = Nemotron.from_pretrained(CHECKPOINT, torch.float32)
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(CHECKPOINT)
    lines = (EXAMPLES / "tiny_llada/questions.jsonl").read_text().splitlines()
    right = 0
    for line in map(json.loads, islice(lines, 12)):
        messages = [{"role": "user", "content": line["question"]}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"][
            0
        ]
        if is_causal:
            tokens = generate_causally(model, prompt, 40)
        else:
            policy = UnmaskPolicy("threshold")
            tokens = generate(model, prompt, gen_length=64, block_length=32, policy=policy, rules=NEMOTRON).tokens
        end = (tokens == model.config.eos_token_id).int().argmax()
        right += tokenizer.decode(tokens[:end]) == line["answer"]
    assert right >= 11
