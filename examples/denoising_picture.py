"""Draw how a block of text comes about, forward by forward, without and with Spiffy.

Both halves come from the reference decoders on the small LLaDA of this checkout. They go through the same canvases,
with Spiffy through several of them per forward.

    .venv/bin/python examples/denoising_picture.py "Reverse jay jay dog" build/denoising.svg
"""

import json
import sys
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from vllm_dllm.config import DllmConfig
from vllm_dllm.reference import decode, spiffy
from vllm_dllm.reference.layers import LayerKv
from vllm_dllm.reference.model import LLaDA
from vllm_dllm.spiffy_config import parse_spiffy, read_speculative_config, spiffy_settings, to_json_object

TINY = Path(__file__).parent / "tiny_llada"
BLOCK_LENGTH = 32
MASKED, KNOWN, MODEL, DRAFT = range(4)
COLORS = {MASKED: "#ffffff", KNOWN: "#e4e4e4", MODEL: "#8ecae6", DRAFT: "#ffb347"}
LABELS = {MODEL: "chosen in this forward", DRAFT: "accepted draft", KNOWN: "known before", MASKED: "masked"}


@dataclass(frozen=True)
class Picture:
    """A block by forwards: what each position holds after each of them, and how it came there."""

    tokens: Tensor  # [num_forwards, block_length] int64
    origin: Tensor  # [num_forwards, block_length] int64: MASKED, KNOWN, MODEL or DRAFT


@dataclass
class RecordingModel:
    """A model that keeps the blocks it was asked about; a refresh is not one."""

    model: LLaDA
    canvases: list[tuple[int, ...]] = field(default_factory=list)

    def __getattr__(self, name: str) -> object:
        return getattr(self.model, name)

    def forward(self, tokens: Tensor, start: int, kv: list[LayerKv] | None) -> tuple[Tensor, list[LayerKv]]:
        """Forward, and note the canvas."""
        if kv is not None:
            self.canvases.append(tuple(tokens.tolist()))
        return self.model.forward(tokens, start, kv)


def states_of(model: LLaDA, prompt: Tensor, **options: object) -> list[Tensor]:
    """Return the canvases of the first block without drafts, from all masked to none; each [block_length] int64."""
    generation = decode.generate(model, prompt, kv=decode.KvPolicy("dual"), gen_length=BLOCK_LENGTH, **options)
    return [torch.full((BLOCK_LENGTH,), model.config.mask_token_id), *generation.history]


def roots_of(model: LLaDA, prompt: Tensor, **options: object) -> list[tuple[int, ...]]:
    """Return the canvases that forwards with drafts began with, the refresh left out.

    The reference forwards the drafts one by one and the root last. A draft has fewer masks than its root and a root
    fewer than the one before, so a root is whatever has more masks than all that follows.
    """
    recorder = RecordingModel(model)
    spiffy.generate(recorder, prompt, gen_length=BLOCK_LENGTH, **options)
    roots: list[tuple[int, ...]] = []
    most = 0
    for canvas in reversed(recorder.canvases):
        num_masked = canvas.count(model.config.mask_token_id)
        if num_masked > most:
            roots.append(canvas)
            most = num_masked
    return roots[::-1]


def picture_of(states: list[Tensor], roots: list[tuple[int, ...]], mask_token_id: int) -> Picture:
    """Group the states by forwards, each of which begins with a root; the first is the refresh."""
    rows = [tuple(state.tolist()) for state in states]
    begins = [0, *(rows.index(root) for root in roots), len(rows) - 1]
    origin = torch.full((len(begins) - 1, BLOCK_LENGTH), MASKED)
    for number, (begin, end) in enumerate(pairwise(begins)):
        # The last state of a forward follows from the last draft that came true.
        before, drafted, after = (states[index] != mask_token_id for index in (begin, end - 1, end))
        origin[number] = after.long() * MODEL
        origin[number, drafted] = DRAFT
        origin[number, before] = KNOWN
    return Picture(torch.stack([states[index] for index in begins[1:]]), origin)


def denoising(question: str, config_file: Path) -> tuple[dict[str, Picture], PreTrainedTokenizerFast]:
    """Decode a question without and with Spiffy."""
    checkpoint = TINY / "checkpoint"
    model = LLaDA.from_pretrained(checkpoint, torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    prompt = torch.tensor(tokenizer.encode(text, add_special_tokens=False))
    config = to_json_object(parse_spiffy(read_speculative_config(config_file)))
    settings = spiffy_settings(json.dumps(config), DllmConfig(block_length=BLOCK_LENGTH), str(checkpoint), "llada")
    options = {
        "block_length": BLOCK_LENGTH,
        "policy": decode.UnmaskPolicy("static", confidence_dtype=torch.float64),
        "sampling": decode.Sampling(forbidden_ids=(model.config.mask_token_id,)),
    }
    states = states_of(model, prompt, **options)
    budget = settings.max_nodes if settings.budget is None else settings.budget
    roots = roots_of(model, prompt, graph=settings.graph, budget=budget, **options)
    mask_token_id = model.config.mask_token_id
    each_state = [tuple(state.tolist()) for state in states[1:-1]]
    return {
        "without drafts": picture_of(states, each_state, mask_token_id),
        "Spiffy": picture_of(states, roots, mask_token_id),
    }, tokenizer


def draw(question: str, config_file: Path, path: Path) -> dict[str, int]:
    """Write a picture (.svg or .png) of a question's denoising; returns the forwards of each half."""
    pictures, tokenizer = denoising(question, config_file)
    most = max(len(picture.tokens) for picture in pictures.values())
    figure = Figure(figsize=(2 * 0.42 * BLOCK_LENGTH, 0.24 * most + 1.2), layout="constrained")
    for axes, (name, picture) in zip(figure.subplots(1, 2, sharey=True), pictures.items(), strict=True):
        _draw_half(axes, picture, tokenizer)
        axes.set_title(f"{name}: {len(picture.tokens)} forwards", fontsize=11)
        axes.set_ylim(most - 0.5, -0.5)
    figure.suptitle(f"{question}   (32 positions, one token per step; forward 0 is the refresh)", fontsize=11)
    patches = [figure.axes[0].scatter([], [], marker="s", s=90, c=COLORS[kind], ec="0.6") for kind in LABELS]
    figure.legend(patches, LABELS.values(), loc="outside lower center", ncols=len(LABELS), fontsize=9)
    figure.savefig(path)
    return {name: len(picture.tokens) for name, picture in pictures.items()}


def _draw_half(axes: Axes, picture: Picture, tokenizer: PreTrainedTokenizerFast) -> None:
    axes.imshow(picture.origin, cmap=ListedColormap(list(COLORS.values())), vmin=0, vmax=3, aspect="auto")
    axes.set_xticks(torch.arange(BLOCK_LENGTH) - 0.5, minor=True)
    axes.set_yticks(torch.arange(len(picture.tokens)) - 0.5, minor=True)
    axes.grid(which="minor", color="0.85", linewidth=0.5)
    axes.tick_params(which="minor", length=0)
    axes.set_xlabel("position")
    axes.set_ylabel("forward")
    for number, position in (picture.origin >= MODEL).nonzero().tolist():
        token = tokenizer.convert_ids_to_tokens(int(picture.tokens[number, position]))
        text = token.replace("\u0120", "\u00b7").replace("<|endoftext|>", "eos")
        axes.text(position, number, text, ha="center", va="center", fontsize=8, parse_math=False)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    print(draw(sys.argv[1], TINY / "spiffy.json", Path(sys.argv[2])))
