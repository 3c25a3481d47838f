"""The reference of linear self-speculation: autoregression's tokens, and the published loop as scalars without K/V."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

from tests.reference.test_first_token import PROMPT, denoising, make_nemotron
from vllm_dllm.reference.block_causal import generate_causally
from vllm_dllm.reference.layers import LayerKv
from vllm_dllm.reference.nemotron import Nemotron, draft_model
from vllm_dllm.reference.sampling import Sampling
from vllm_dllm.reference.self_speculation import generate, next_window

SAMPLINGS = {
    "greedy": Sampling(),
    "sampled": Sampling(temperature=0.8, seed=5),
    "filtered": Sampling(temperature=1.3, seed=-7, top_k=9, top_p=0.8),
}


def write_adapter(path: Path, model: Nemotron, scale: float, rank: int = 4) -> dict[str, Tensor]:
    """Write a random adapter as a checkpoint has it; returns its tensors."""
    generator = torch.Generator().manual_seed(3)
    width = model.config.num_attention_heads * model.config.head_dim
    shapes = {"A": (rank, width), "B": (model.config.hidden_size, rank)}
    tensors = {
        f"base_model.model.encoder.layers.{layer}.self_attn.o_proj.lora_{part}.weight": torch.randn(
            *shape, generator=generator
        )
        * 0.1
        for layer in range(model.config.num_hidden_layers)
        for part, shape in shapes.items()
    }
    folder = path / "linear_spec_lora"
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank * scale, "target_modules": ["o_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return tensors


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Nemotron, Nemotron]]:
    """A model and the one that drafts, without an adapter and with one."""
    torch.manual_seed(0)
    model, path = make_nemotron(), tmp_path_factory.mktemp("nemotron")
    write_adapter(path, model, scale=4.0)
    return {"none": (model, draft_model(model, path / "other")), "lora": (model, draft_model(model, path))}


def test_the_adapter_is_added_to_the_output_projection(tmp_path: Path) -> None:
    model = make_nemotron()
    tensors = write_adapter(tmp_path, model, scale=4.0)
    drafter, x = draft_model(model, tmp_path), torch.randn(5, 48)
    for index, (own, drafts) in enumerate(zip(model.encoder.layers, drafter.encoder.layers, strict=True)):
        name = f"base_model.model.encoder.layers.{index}.self_attn.o_proj.lora_"
        expected = own.self_attn.o_proj(x) + 4.0 * (x @ tensors[f"{name}A.weight"].T) @ tensors[f"{name}B.weight"].T
        assert_close(drafts.self_attn.o_proj(x), expected)
        assert torch.equal(own.mlp.down_proj.weight, drafts.mlp.down_proj.weight)


@pytest.mark.parametrize(
    ("window", "num_drafts", "num_accepted", "expected"),
    [
        (8, 7, 7, 16),
        (16, 15, 15, 32),
        (32, 31, 31, 32),
        (8, 7, 3, 8),
        (32, 31, 15, 16),
        (32, 31, 16, 32),
        (16, 15, 0, 8),
    ],
)
def test_window(window: int, num_drafts: int, num_accepted: int, expected: int) -> None:
    assert next_window(window, num_drafts, num_accepted, 32) == expected


def test_a_small_largest_window() -> None:
    assert next_window(4, 3, 0, 4) == next_window(4, 3, 3, 4) == 4


@torch.no_grad()
def published(model: Nemotron, drafter: Nemotron, gen_length: int, longest: int) -> tuple[list[int], list[int]]:
    """The published loop, all before a window computed anew; the tokens, and how many drafts of each were accepted."""

    def causal(tokens: list[int]) -> tuple[list[int], list[LayerKv]]:
        visible = torch.tensor(denoising(len(tokens), len(tokens)))
        logits, kv = model(torch.tensor(tokens), visible=visible)
        return logits.argmax(-1).tolist(), kv

    end, window, accepted = len(PROMPT) + gen_length, 8, []
    x = [*PROMPT, causal(PROMPT)[0][-1]]
    while len(x) < end:
        begin = len(x) - 1
        stop = begin + min(window, end - len(x))
        if stop - begin == 1:
            return [*x, causal(x)[0][-1]][len(PROMPT) :], accepted
        masked = [x[-1], *[model.config.mask_token_id] * (stop - len(x))]
        drafted = drafter(torch.tensor(masked), begin, causal(x[:-1])[1])[0].argmax(-1).tolist()[1:]
        verified, num = causal([*x, *drafted])[0], 0
        while num < len(drafted) and verified[begin + num] == drafted[num]:
            num += 1
        x += verified[begin : begin + num + 1]
        accepted.append(num)
        if num == stop - begin - 1:
            window = min(2 * window, longest)
        elif num <= (stop - begin - 1) / 2:
            window = max(window // 2, 8)
    return x[len(PROMPT) :], accepted


@pytest.mark.parametrize("which", ["none", "lora"])
@pytest.mark.parametrize("gen_length", [1, 2, 7, 30])
def test_published_loop(models: dict[str, tuple[Nemotron, Nemotron]], which: str, gen_length: int) -> None:
    model, drafter = models[which]
    made = generate(model, drafter, torch.tensor(PROMPT), gen_length=gen_length)
    assert (made.tokens.tolist(), [num for _, num in made.windows]) == published(model, drafter, gen_length, 32)


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("which", ["none", "lora"])
def test_the_tokens_are_those_of_autoregression(
    models: dict[str, tuple[Nemotron, Nemotron]], which: str, sampling: Sampling
) -> None:
    (model, drafter), prompt = models[which], torch.tensor(PROMPT)
    expected = generate_causally(model, prompt, 40, sampling)
    made = generate(model, drafter, prompt, gen_length=40, sampling=sampling)
    assert torch.equal(made.tokens, expected)
    assert made.num_verified + sum(num for _, num in made.windows) == 40, "each forward that verifies adds one token"
    [stop] = {int(expected[20])} - set(expected[:20].tolist()) or {int(expected[0])}
    stopped = generate(model, drafter, prompt, gen_length=40, sampling=sampling, stop_ids=(stop,))
    assert stopped.tokens.tolist() == expected[: expected.tolist().index(stop) + 1].tolist()


def test_windows_grow_while_all_drafts_come_true() -> None:
    """A model whose ids look alike, and whose positions do not see each other, always says the same."""
    model = make_nemotron()
    model.encoder.embed_tokens.weight.data[:] = model.encoder.embed_tokens.weight.data[:1].clone()
    for layer in model.encoder.layers:
        layer.self_attn.o_proj.weight.data.zero_()
    made = generate(model, model, torch.tensor(PROMPT), gen_length=64)
    assert made.windows == [(7, 7), (15, 15), (31, 31), (6, 6)]
    assert (made.nfe, len(made.tokens)) == (9, 64)
    short = generate(model, model, torch.tensor(PROMPT), gen_length=20, max_window=8)
    assert short.windows == [(7, 7), (7, 7), (2, 2)]
