"""The reference of WeDLM: which positions are unmasked, and the published loop as scalars without K/V."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.reference.conftest import randomised
from vllm_dllm.noise import gumbel, stream_keys
from vllm_dllm.reference.qwen import Qwen, QwenConfig
from vllm_dllm.reference.sampling import Sampling
from vllm_dllm.reference.wedlm import WindowRule, generate

MASK, VOCAB = 3, 37
PROMPT = [7, 11, 19, 30, 4, 8, 12, 36, 21]
PUBLISHED = WindowRule()
GREEDY = Sampling(forbidden_ids=(MASK,))


def make_model(*, has_biases: bool = False, std: float = 0.3) -> Qwen:
    torch.manual_seed(0)
    config = QwenConfig(
        architecture="WeDLMForCausalLM",
        attention_bias=has_biases,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        vocab_size=VOCAB,
        mask_token_id=MASK,
        eos_token_id=1,
        rope_theta=1e4,
        max_position_embeddings=256,
    )
    return randomised(Qwen(config))


@torch.no_grad()
def published(
    model: Qwen, gen_length: int, window: int, rule: WindowRule, seed: int = 0, temperature: float = 0.0
) -> tuple[list[int], int]:
    """The published loop, everything before a window computed anew; the tokens, and the forwards that it takes."""
    emitted: list[int] = []
    slots: list[int | None] = [None] * window
    forwards = 0
    while True:
        num_front = slots.index(None) if None in slots else len(slots)
        slots += [None] * num_front
        order = [i for i, slot in enumerate(slots) if slot is not None]
        order += [i for i, slot in enumerate(slots) if slot is None]
        before = [*PROMPT, *emitted]
        ids = before + [MASK if slots[i] is None else slots[i] for i in order]
        positions = torch.tensor([*range(len(before)), *(len(before) + i for i in order)])
        visible = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
        logits = model(torch.tensor(ids), visible=visible, positions=positions)[0]
        forwards += 1
        emitted += [slot for slot in slots[:num_front] if slot is not None]
        if len(emitted) >= gen_length:
            return emitted[:gen_length], forwards
        slots = slots[num_front:]
        masked = [i for i, slot in enumerate(slots) if slot is None]
        rows = logits[len(before) :][-len(masked) :]
        rows[:, MASK] = -torch.inf
        for place in _filled(dict(zip(masked, rows.double(), strict=True)), rule):
            noise = 0.0
            if temperature:
                key = stream_keys(*(torch.tensor(x) for x in (seed, len(PROMPT) + len(emitted) + place, len(masked))))
                noise = gumbel(key, torch.arange(VOCAB)) * temperature
            slots[place] = int((rows[masked.index(place)].double() + noise).argmax())


def _filled(rows: dict[int, Tensor], rule: WindowRule) -> list[int]:
    """Return the places of a window that are filled, of the logits of the masked ones."""
    first, value = min(rows), {}
    for place, row in rows.items():
        probs = row.softmax(0).tolist()
        entropy = -sum(p * math.log(p) for p in probs if p > 0)
        value[place] = entropy + rule.position_penalty * (place - first)
    below = [place for place in value if value[place] < rule.entropy_bound]
    return below or [min(value, key=lambda place: (value[place], place))]


CASES: dict[str, tuple[int, int, WindowRule]] = {
    "published": (40, 16, PUBLISHED),
    "one at a time": (24, 8, replace(PUBLISHED, entropy_bound=1e-9)),
    "many": (60, 16, replace(PUBLISHED, entropy_bound=1.6)),
    "steep": (31, 7, replace(PUBLISHED, entropy_bound=1.6, position_penalty=0.2)),
    "all": (33, 5, replace(PUBLISHED, entropy_bound=99.0, position_penalty=0.0)),
    "autoregressive": (12, 1, PUBLISHED),
}


@pytest.mark.parametrize("has_biases", [False, True], ids=["8b", "7b"])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_published_loop(case: str, has_biases: bool) -> None:
    model, (gen_length, window, rule) = make_model(has_biases=has_biases), CASES[case]
    expected, forwards = published(model, gen_length, window, rule)
    found = generate(model, torch.tensor(PROMPT), gen_length=gen_length, window=window, rule=rule, sampling=GREEDY)
    assert found.tokens.tolist() == expected
    assert found.nfe == forwards - 1, "but for the one that only stores the last tokens"
    assert len({*expected}) > 3


def test_draws_are_of_the_seed_the_position_and_what_is_masked() -> None:
    model, (gen_length, window, rule) = make_model(), CASES["many"]
    expected, _ = published(model, gen_length, window, rule, seed=7, temperature=0.8)
    sampling = replace(GREEDY, seed=7, temperature=0.8)
    found = generate(model, torch.tensor(PROMPT), gen_length=gen_length, window=window, rule=rule, sampling=sampling)
    assert found.tokens.tolist() == expected
    other = generate(
        model,
        torch.tensor(PROMPT),
        gen_length=gen_length,
        window=window,
        rule=rule,
        sampling=replace(sampling, seed=8),
    )
    assert other.tokens.tolist() != expected


def test_windows_fill_out_of_order_and_slide_by_any_number() -> None:
    """Else the cases above would say nothing of rows that are not in the order of their positions."""
    model, (gen_length, window, rule) = make_model(), CASES["many"]
    steps = generate(
        model, torch.tensor(PROMPT), gen_length=gen_length, window=window, rule=rule, sampling=GREEDY
    ).steps
    assert {0, 1} < {final for _, final in steps}, "the window never waits, or never slides by several"
    assert any(final > unmasked for unmasked, final in steps), "nothing that was out of order comes to the front"


def test_an_answer_does_not_depend_on_how_long_it_may_be() -> None:
    model, (_, window, rule) = make_model(), CASES["many"]
    prompt = torch.tensor(PROMPT)
    long = generate(model, prompt, gen_length=50, window=window, rule=rule, sampling=GREEDY)
    for gen_length in (1, 2, 15, 16, 17, 33):
        found = generate(model, prompt, gen_length=gen_length, window=window, rule=rule, sampling=GREEDY)
        assert found.tokens.tolist() == long.tokens[:gen_length].tolist()


def test_a_stop_token_at_the_front_ends_the_answer() -> None:
    model, (gen_length, window, rule) = make_model(), CASES["many"]
    prompt = torch.tensor(PROMPT)
    whole = generate(model, prompt, gen_length=gen_length, window=window, rule=rule, sampling=GREEDY)
    tokens = whole.tokens.tolist()
    stop = tokens[len(tokens) // 2]
    found = generate(model, prompt, gen_length=gen_length, window=window, rule=rule, sampling=GREEDY, stop_ids=(stop,))
    assert found.tokens.tolist() == tokens[: tokens.index(stop) + 1]
    assert found.nfe < whole.nfe


@pytest.mark.parametrize("room", [1, 5, 16, 21])
def test_a_window_ends_at_the_limit(room: int) -> None:
    """Up to where it reaches the limit the answer is the same."""
    model, (_, window, rule) = make_model(), CASES["many"]
    prompt, limit = torch.tensor(PROMPT), len(PROMPT) + room
    found = generate(model, prompt, gen_length=50, window=window, rule=rule, sampling=GREEDY, limit=limit)
    assert len(found.tokens) == room
    assert sum(unmasked for unmasked, _ in found.steps) == sum(final for _, final in found.steps) == room


def rows_of(entropies: list[float]) -> Tensor:
    """Return rows of two tokens that have these entropies, in nats, up to ln 2."""

    def row(entropy: float) -> list[float]:
        low, high = 1e-12, 0.5
        for _ in range(200):
            p = (low + high) / 2
            found = float(torch.special.entr(torch.tensor([p, 1 - p], dtype=torch.float64)).sum())
            low, high = (p, high) if found < entropy else (low, p)
        return [float(torch.log(torch.tensor(1 - p))), float(torch.log(torch.tensor(p)))]

    return torch.tensor([row(entropy) for entropy in entropies], dtype=torch.float64)


@pytest.mark.parametrize(
    ("entropies", "masked", "penalty", "chosen"),
    [
        ([0.1, 0.3, 0.5, 0.2], [0, 1, 2, 3], 0.02, [0, 1, 3]),
        ([0.5, 0.45, 0.42, 0.35], [0, 1, 2, 3], 0.02, [3]),  # the lowest: .50, .47, .46, .41
        ([0.39, 0.39, 0.39, 0.39], [0, 1, 2, 3], 0.02, [0]),  # the penalty lifts the others over the bound
        ([0.39, 0.39, 0.39, 0.39], [0, 1, 2, 3], 0.0, [0, 1, 2, 3]),
        ([0.6, 0.5, 0.5, 0.69], [0, 1, 2, 3], 0.02, [1]),  # none below: .60, .52, .54, .75
        ([0.5, 0.5, 0.5, 0.5], [0, 1, 2, 3], 0.0, [0]),  # ties: the first
        ([0.1, 0.39, 0.1, 0.37], [1, 3], 0.02, [1]),  # from the first masked position on: .39, .41
        ([0.1, 0.45, 0.1, 0.35], [1, 3], 0.02, [3]),
        ([0.1, 0.1, 0.6, 0.6], [2, 3], 0.02, [2]),
    ],
)
def test_which_positions_are_unmasked(
    entropies: list[float], masked: list[int], penalty: float, chosen: list[int]
) -> None:
    positions = torch.tensor(masked)
    found = WindowRule(position_penalty=penalty).unmasks(rows_of(entropies)[positions], 20 + positions)
    assert positions[found].tolist() == chosen
