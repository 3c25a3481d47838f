"""The reference of Nemotron and Fast-dLLM v2: layers as transformers has them, decoders as scalar loops without K/V."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import Ministral3Config, Ministral3ForCausalLM

from tests.reference.conftest import randomised
from tests.reference.test_qwen import IDS, ROUNDING
from vllm_dllm.reference.block_causal import generate, generate_causally
from vllm_dllm.reference.nemotron import Nemotron
from vllm_dllm.reference.policy import FAST_DLLM, NEMOTRON, UnmaskPolicy
from vllm_dllm.reference.qwen import Qwen, QwenConfig
from vllm_dllm.reference.sampling import Sampling

MASK = 3
PROMPT = [7, 11, MASK, 19, 30, 4, 8, 12, 36, 21, 5, 9, 9, 2, 33, 17, 20]
GREEDY = Sampling(forbidden_ids=(MASK,))
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 8.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


def make_nemotron(original: int = 8, beta: float = 0.1) -> Nemotron:
    """Make a random model whose query scale changes every `original` positions."""
    config = QwenConfig(
        architecture="NemotronLabsDiffusionModel",
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        vocab_size=37,
        mask_token_id=MASK,
        eos_token_id=1,
        rope_theta=1e6,
        rope_scaling=YARN | {"original_max_position_embeddings": original},
        max_position_embeddings=8 * original,
        query_scale_beta=beta,
    )
    return randomised(Nemotron(config))


def ministral(model: Nemotron) -> Ministral3ForCausalLM:
    """Return transformers' model with the same weights."""
    config = model.config
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    names += ("head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps")
    rope = {**config.rope_scaling, "llama_4_scaling_beta": config.query_scale_beta}
    other = Ministral3ForCausalLM(
        Ministral3Config(
            rope_parameters=rope, attn_implementation="eager", **{name: getattr(config, name) for name in names}
        )
    )
    weights = {
        name.replace("encoder.", "model.").replace("diffusion_head", "lm_head"): weight
        for name, weight in model.state_dict().items()
    }
    other.load_state_dict(weights)
    return other.eval()


def hidden(visible: Tensor) -> Tensor:
    return torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)[None, None]


def denoising(begin: int, end: int) -> list[list[bool]]:
    """Say who sees whom while Nemotron denoises a block: before it each position those before it, in it all of it."""
    return [[key < end if query >= begin else key <= query for key in range(end)] for query in range(end)]


@torch.no_grad()
@pytest.mark.parametrize("begin", [13, 9, 0], ids=["causal", "block", "bidirectional"])
def test_nemotrons_logits_equal_transformers(begin: int) -> None:
    model = make_nemotron()
    visible = torch.tensor(denoising(begin, len(IDS)))
    expected = ministral(model)(IDS[None], attention_mask=hidden(visible), use_cache=False).logits[0]
    assert_close(model(IDS, visible=visible)[0], expected, **ROUNDING)
    assert not torch.allclose(make_nemotron(beta=0.0)(IDS, visible=visible)[0], expected), "no query was scaled"


@torch.no_grad()
@pytest.mark.parametrize("start", [16_380, 40_000])
def test_positions_beyond_16384(start: int) -> None:
    """The published original length: half of the first rows' queries are scaled, all of the second's."""
    model, positions = make_nemotron(original=16_384), torch.arange(start, start + len(IDS))
    visible = torch.tensor(denoising(5, len(IDS)))
    expected = ministral(model)(
        IDS[None], attention_mask=hidden(visible), position_ids=positions[None], use_cache=False
    ).logits[0]
    found = model(IDS, visible=visible, positions=positions)[0]
    assert_close(found, expected, rtol=2e-4, atol=5e-4)  # angles of 40,000 radians in float32
    unscaled = make_nemotron(original=16_384)
    unscaled.load_state_dict(model.state_dict())
    object.__setattr__(unscaled.config, "query_scale_beta", 0.0)
    other = unscaled(IDS, visible=visible, positions=positions)[0]
    assert (found - other).abs().max() > 0.05


def best(row: list[float]) -> tuple[int, float]:
    """Return the likeliest token but the mask, and its probability."""
    row = [-float("inf") if token == MASK else x for token, x in enumerate(row)]
    probs = torch.tensor(row, dtype=torch.float64).softmax(0)
    return int(probs.argmax()), float(probs.max())


@torch.no_grad()
def native_decoder(model: Qwen, prompt: list[int], gen_length: int, length: int, policy: UnmaskPolicy) -> list[int]:
    """Nemotron's published loop, one masked forward over everything per step."""
    x = list(prompt)
    while len(x) < len(prompt) + gen_length:
        begin, end = len(x), min(len(x) + length, len(prompt) + gen_length)
        causal = torch.tensor(denoising(begin, begin))
        x.append(best(model(torch.tensor(x), visible=causal)[0][-1].tolist())[0])
        x += [MASK] * (end - len(x))
        masked, steps_left = set(range(begin + 1, end)), policy.steps or length
        while masked:
            rows = model(torch.tensor(x), visible=torch.tensor(denoising(begin, end)))[0].tolist()
            found = {p: best(rows[p]) for p in masked}
            order = sorted(masked, key=lambda p: (-found[p][1], p))
            sure = [p for p in order if found[p][1] >= policy.threshold]
            by_schedule = order[: -(-len(masked) // steps_left)]
            for p in (sure or order[:1]) if policy.name == "threshold" else by_schedule:
                x[p] = found[p][0]
                masked.remove(p)
            steps_left -= 1
    return x[len(prompt) :]


NATIVE = {
    "0.9": UnmaskPolicy("threshold", threshold=0.9, confidence_dtype=torch.float64),
    "0.4": UnmaskPolicy("threshold", threshold=0.4, confidence_dtype=torch.float64),
    "one": UnmaskPolicy("static", confidence_dtype=torch.float64),
    "steps": UnmaskPolicy("static", steps=3, confidence_dtype=torch.float64),
}


@pytest.mark.parametrize("policy", NATIVE.values(), ids=NATIVE)
@pytest.mark.parametrize(("prompt_len", "gen_length"), [(1, 8), (7, 24), (16, 13), (17, 1), (17, 9)])
def test_nemotrons_native_decoder(prompt_len: int, gen_length: int, policy: UnmaskPolicy) -> None:
    if policy.steps:  # a short last block takes the schedule's last steps, which is ours
        gen_length = -(-gen_length // 8) * 8
    model, prompt = make_nemotron(), PROMPT[:prompt_len]
    lengths = {"gen_length": gen_length, "block_length": 8}
    generated = generate(model, torch.tensor(prompt), policy=policy, sampling=GREEDY, rules=NEMOTRON, **lengths)
    assert generated.tokens.tolist() == native_decoder(model, prompt, gen_length, 8, policy)
    assert generated.nfe_commit == (gen_length - 1) // 8


def test_ar_mode_equals_transformers() -> None:
    model = make_nemotron()
    other = ministral(model)
    prompt = torch.tensor([PROMPT])
    expected = other.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False)
    ends = expected[0, len(PROMPT) :].tolist()
    assert generate_causally(model, prompt[0], 20).tolist()[: len(ends)] == ends


@torch.no_grad()
def sub_block_decoder(model: Qwen, prompt: list[int], gen_length: int, threshold: float, part: int) -> list[int]:
    """Fast-dLLM v2's published loop for blocks of 16, one masked forward over everything per step."""
    length = 16
    end_of_all = -(-(len(prompt) + gen_length) // length) * length
    x = list(prompt)
    for begin in range(len(prompt) // length * length, end_of_all, length):
        end = begin + length
        seen = torch.tensor([[key // length <= query // length for key in range(end)] for query in range(end)])
        if len(x) == begin:
            x.append(best(model(torch.tensor(x), visible=seen[:begin, :begin])[0][-1].tolist())[0])
        masked = set(range(len(x), end))
        x += [MASK] * (end - len(x))
        while masked:
            own = [p for p in masked if p // part == min(masked) // part]
            rows = model(torch.tensor(x), visible=seen)[0].tolist()
            found = {p: best(rows[p - 1]) for p in own}
            order = sorted(own, key=lambda p: (-found[p][1], p))
            for p in {order[0], *(p for p in own if found[p][1] > threshold)}:
                x[p] = found[p][0]
                masked.remove(p)
    return x[len(prompt) :]


@pytest.mark.parametrize("threshold", [0.3, 0.9, 1.0])
@pytest.mark.parametrize("part", [8, 4])
@pytest.mark.parametrize(("prompt_len", "gen_length"), [(1, 20), (15, 1), (16, 32), (17, 30)])
def test_fast_dllms_decoder(make_qwen, prompt_len: int, gen_length: int, threshold: float, part: int) -> None:
    model, prompt = make_qwen(architecture="Fast_dLLM_QwenForCausalLM"), PROMPT[:prompt_len]
    policy = UnmaskPolicy("dynamic", threshold=threshold, confidence_dtype=torch.float64)
    rules = replace(FAST_DLLM, sub_block_length=part)
    lengths = {"gen_length": gen_length, "block_length": 16}
    generated = generate(model, torch.tensor(prompt), policy=policy, sampling=GREEDY, rules=rules, **lengths)
    assert generated.tokens.tolist() == sub_block_decoder(model, prompt, gen_length, threshold, part)
