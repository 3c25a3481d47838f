"""Which drafts came true at each step of real generations, small enough to be kept: `recorded.json`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.ablations.drafting import load
from vllm_dllm.calibrate.simulate import BlockDrafts, draft_blocks
from vllm_dllm.draft.calibrated import GraphDrafter

MAX_DRAFTS = 10
"""What `max_nodes` is by default."""
GRAPH_NODES = 32
FILE = Path(__file__).with_name("recorded.json")

Anchor = tuple[int, ...]
"""How many drafts a step needs, to save one more step, two, ...: ascending, as steps evaluate the best drafts first."""


@dataclass(frozen=True, slots=True)
class Recording:
    """What a calibrated graph's drafts came to on prompts that were held out.

    Attributes:
        block_length: of the model.
        is_causal: a block is stored by a commit beside the next one's first step; else its sequence is refreshed.
        prior: transitions expected to be saved, by budget (`Drafter.prior`).
        prompts: of each its blocks, of each block the anchors, one for each step but the first, which has no drafts.
    """

    block_length: int
    is_causal: bool
    prior: tuple[float, ...]
    prompts: tuple[tuple[tuple[Anchor, ...], ...], ...]

    @classmethod
    def of_traces(cls, path: Path, held_out: float, num_prompts: int) -> "Recording":
        """Calibrate on a part of the traces, and read what the drafts came to on the first of the others."""
        material = load(path, held_out)
        graph = material.graph(GRAPH_NODES)
        traces = material.held_out[:num_prompts]
        return cls(
            block_length=material.settings.block_length,
            is_causal=material.settings.is_block_causal,
            prior=tuple(round(value, 4) for value in GraphDrafter(graph).prior()[: MAX_DRAFTS + 1]),
            prompts=tuple(tuple(map(needed, draft_blocks(graph, [trace], material.decoding))) for trace in traces),
        )

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> "Recording":
        """Make one of what `as_json` made."""
        prompts = tuple(
            tuple(tuple(tuple(int(c, 36) for c in anchor.strip("-")) for anchor in block.split()) for block in prompt)
            for prompt in fields["prompts"]
        )
        return cls(fields["block_length"], fields["is_causal"], tuple(fields["prior"]), prompts)

    def as_json(self) -> dict[str, Any]:
        """Return the fields; a block is a word for each anchor, a letter of base 36 for each need, - for none."""
        prompts = [
            [" ".join("".join(map(_letter, anchor)) or "-" for anchor in block) for block in prompt]
            for prompt in self.prompts
        ]
        return {**asdict(self), "prompts": prompts}


def _letter(number: int) -> str:
    return "0123456789abcdefghijklmnopqrstuvwxyz"[number]


def needed(block: BlockDrafts) -> tuple[Anchor, ...]:
    """Return the anchors of a block, as far as `MAX_DRAFTS` reach."""
    return tuple(_needs(ahead) for ahead in block.ahead[:, :MAX_DRAFTS].tolist())


def _needs(ahead: Sequence[int]) -> Anchor:
    """Read how many drafts each depth needs of how far ahead each draft, best first, is a true canvas."""
    needs: list[int] = []
    while (depth := len(needs) + 1) in ahead:
        needs.append(max(1 + ahead.index(depth), needs[-1] if needs else 0))
    return tuple(needs)


def recordings() -> dict[str, Recording]:
    """Return those of `recorded.json` by name."""
    return {name: Recording.read(fields) for name, fields in json.loads(FILE.read_text()).items()}
