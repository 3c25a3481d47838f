"""Draw how a block of text is denoised, forward by forward, without and with Spiffy, as an SVG of a README's width.

Both halves come from the reference decoders on the small LLaDA of this checkout. They go through the same canvases,
with Spiffy through several of them per forward. The picture of the README:

    .venv/bin/python examples/denoising_picture.py "JSON room 13, name emu" docs/denoising.svg
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from xml.sax.saxutils import escape

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from vllm_dllm.config import DllmConfig
from vllm_dllm.reference import decode, spiffy
from vllm_dllm.reference.layers import LayerKv
from vllm_dllm.reference.model import LLaDA
from vllm_dllm.spiffy_config import parse_spiffy, read_speculative_config, spiffy_settings, to_json_object

TINY = Path(__file__).parent / "tiny_llada"
BLOCK_LENGTH = 16
MASKED, KNOWN, MODEL, DRAFT = range(4)
COLORS = {MASKED: "#ffffff", KNOWN: "#e3e7eb", MODEL: "#79b8ea", DRAFT: "#ffb454"}
LABELS = {MODEL: "unmasked by the forward", DRAFT: "accepted draft", KNOWN: "known before", MASKED: "masked"}
LEFT, CELL_WIDTH, CELL_HEIGHT = 36, 48, 22
WIDTH = LEFT + BLOCK_LENGTH * CELL_WIDTH + 16
# Its own light ground makes it readable on a dark page, too.
HEAD = """<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">
<title>{title}</title>
<style>text {{ font: 13px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; fill: #1f2328 }}
.n {{ fill: #59636e; font-size: 12px; text-anchor: end }} .t {{ text-anchor: middle }}
.h {{ font: 600 15px system-ui, "DejaVu Sans", sans-serif }} .l {{ font: 13px system-ui, "DejaVu Sans", sans-serif }}
rect {{ stroke: #c5ccd3 }}</style>
<rect x="0.5" y="0.5" width="{inner}" height="{bottom}" rx="8" fill="#ffffff"/>
"""


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

    def forward(
        self, tokens: Tensor, start: int, kv: list[LayerKv] | None, stays: Tensor | None = None
    ) -> tuple[Tensor, list[LayerKv]]:
        """Forward, and note the canvas."""
        if kv is not None:
            self.canvases.append(tuple(tokens.tolist()))
        return self.model.forward(tokens, start, kv, stays=stays)


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
        # The last state of a forward follows from the last accepted draft.
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
    """Write a picture (.svg) of a question's denoising; returns the forwards of each half."""
    pictures, tokenizer = denoising(question, config_file)
    lines, top = list(_legend(question)), 92
    for name, picture in pictures.items():
        num_forwards = len(picture.tokens)
        lines.append(f'<text class="h" x="{LEFT}" y="{top}">{name}: {num_forwards} forwards</text>')
        lines += _rows(picture, tokenizer, top + 10)
        top += 10 + num_forwards * CELL_HEIGHT + 32
    height = top - 16
    head = HEAD.format(width=WIDTH, height=height, inner=WIDTH - 1, bottom=height - 1, title=escape(question))
    path.write_text(head + "\n".join(lines) + "\n</svg>\n")
    return {name: len(picture.tokens) for name, picture in pictures.items()}


def _legend(question: str) -> Iterator[str]:
    yield f'<text class="l" x="{LEFT}" y="30">Question: {escape(question)}</text>'
    x = LEFT
    for kind, label in LABELS.items():
        yield f'<rect x="{x}" y="43" width="14" height="14" fill="{COLORS[kind]}"/>'
        yield f'<text class="l" x="{x + 20}" y="55">{label}</text>'
        x += 44 + 8 * len(label)


def _rows(picture: Picture, tokenizer: PreTrainedTokenizerFast, top: int) -> Iterator[str]:
    for number, kinds in enumerate(picture.origin.tolist()):
        y = top + number * CELL_HEIGHT
        yield f'<text class="n" x="{LEFT - 8}" y="{y + 15}">{number + 1}</text>'
        for position, kind in enumerate(kinds):
            x = LEFT + position * CELL_WIDTH
            yield f'<rect x="{x}" y="{y}" width="{CELL_WIDTH}" height="{CELL_HEIGHT}" fill="{COLORS[kind]}"/>'
            if kind != MASKED:
                token = tokenizer.convert_ids_to_tokens(int(picture.tokens[number, position]))
                text = escape(token.replace("\u0120", "\u2423").replace("<|endoftext|>", "end"))
                yield f'<text class="t" x="{x + CELL_WIDTH // 2}" y="{y + 15}">{text}</text>'


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    print(draw(sys.argv[1], TINY / "spiffy.json", Path(sys.argv[2])))
