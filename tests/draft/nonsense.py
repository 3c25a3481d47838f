"""A drafter that proposes what no decoder comes to, and says of all of it that it is valid."""

import random
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vllm_dllm.state.canvas import Blocks, CanvasState
from vllm_dllm.unmask.walk import Nodes

KINDS = ("random", "equal", "finished", "roots", "masked", "strangers")


@dataclass
class NonsenseDrafter:
    """Proposes, of one kind or of all by turns: random tokens in random places, also in known ones; the same canvas
    again and again; finished canvases; the root itself; nothing but masks; the roots of other requests. Its depths are
    as wrong. It looks ahead nowhere.

    Attributes:
        num_tokens: ids are below it.
        kinds: of `KINDS`.
        seed: of the guesses.
    """

    num_tokens: int
    kinds: tuple[str, ...] = KINDS
    seed: int = 0
    look_ahead_from: int | None = None
    rng: random.Random = field(init=False)

    memory = None

    def prior(self) -> list[float]:
        return [0.0, *(0.5 + 0.1 * i for i in range(64))]

    def attach(self, canvases: CanvasState) -> None:
        self._canvases, self.rng = canvases, random.Random(self.seed)

    def propose(self, blocks: Blocks, num_drafts: int, *, looks_ahead: bool) -> Nodes:
        mask = self._canvases.mask_token_id
        roots = Nodes.of_roots(self._canvases.canvas[blocks.slots], mask)
        if num_drafts == 0:
            return roots
        root = roots.canvas[:, 0]
        drafts = [self._guess(self.rng.choice(self.kinds), root) for _ in range(num_drafts)]
        canvas = torch.stack(drafts, 1)
        is_valid = torch.ones(canvas.shape[:2], dtype=torch.bool)
        depth = torch.tensor([[self.rng.randint(1, 9) for _ in drafts] for _ in root]).view(canvas.shape[:2])
        return roots.with_drafts(canvas, is_valid, depth, mask)

    def _guess(self, kind: str, root: Tensor) -> Tensor:
        mask = self._canvases.mask_token_id
        tokens = torch.tensor([[self._token() for _ in row] for row in root.tolist()])
        if kind == "random":
            where = torch.tensor([[self.rng.random() < 0.5 for _ in row] for row in root.tolist()])
            return torch.where(where, tokens, root)
        if kind == "equal":
            return torch.full_like(root, self._equal)
        return {
            "finished": torch.where(root == mask, tokens, root),
            "roots": root,
            "masked": torch.full_like(root, mask),
            "strangers": root.roll(1, 0).flip(1),
        }[kind]

    def _token(self) -> int:
        return self.rng.choice([self.rng.randrange(self.num_tokens), self._equal])

    @property
    def _equal(self) -> int:
        return 0 if self._canvases.mask_token_id else 1
