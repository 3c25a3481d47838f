"""LLaDA2.2's rule, which deletes and inserts tokens, as SGLang's `JointThresholdInDel` (sgl-project/sglang) has it.

Other than there, equal confidences go to the lowest position, and a delete or split token of the prompt stays as it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from vllm_dllm.reference.rules import Canvas, Look, best, masked


@dataclass(slots=True)
class Indel:
    """LLaDA2.2's decoding of a block.

    An *original* mask was there when the block began; the token that takes its place stays original, wherever it moves,
    and if the model masks it again, it is an original mask once more. The others were inserted.

    While there are original masks, a step writes all masks of a confidence above `threshold` if these are more than the
    inserted ones, else as many of the surest as there are inserted ones, and one more. Afterwards it writes all. At
    once it replaces each written token that is not the prompt's where another token is likeliest, with a confidence
    above `edit_threshold`. Then tokens move: `delete` takes its own place away, `split` puts a mask before the token
    that it replaces; what is pushed over the block's end is lost, what is missing there is masked.

    A canvas that was written in before would be so again, so the change of least confidence takes the likeliest token
    that its place never took. A block ends with the step that finds nothing to write; or, behind `post_steps` steps
    without original masks or as many as the block and these, with one that writes all masks and no token that moves.

    Attributes:
        threshold: of masks.
        edit_threshold: of written tokens.
        post_steps: steps without original masks, at most.
        delete, split: ids of these tokens.
        num_known: places at the block's begin that are the prompt's.
        goes_on: whether there is another step though no place is masked.
    """

    threshold: float = 0.5
    edit_threshold: float = 0.0
    post_steps: int = 16
    delete: int = 156930
    split: int = 156931
    num_known: int = 0
    goes_on: bool = True
    num_updates: int = 0
    num_post: int = 0
    is_original: list[bool] = field(default_factory=list)  # of places
    seen: set[tuple[int | None, ...]] = field(default_factory=set)
    written: list[set[int]] = field(default_factory=list)  # what each place ever took

    def step(self, canvas: Canvas, looks: Sequence[Look]) -> Canvas:
        """Return the next canvas."""
        if not self.num_updates:
            self.is_original = [token is None for token in canvas]
            self.written = [set() for _ in canvas]
        places, mask = range(len(canvas)), looks[0].mask_token_id
        is_original_mask = [canvas[place] is None and self.is_original[place] for place in places]
        tokens, confidence = map(list, zip(*map(_prediction, looks, is_original_mask), strict=True))
        chosen = self._masks(canvas, is_original_mask, confidence)
        is_last = self._is_last(canvas, is_original_mask, chosen)
        if is_last:
            chosen, barred = masked(canvas), {mask, self.delete, self.split}
            tokens = [
                _best_but(look, barred) if token in barred else token for look, token in zip(looks, tokens, strict=True)
            ]
        edited = [
            place
            for place in places[self.num_known :]
            if canvas[place] not in (None, tokens[place]) and confidence[place] > self.edit_threshold
        ]
        writes = [*chosen, *edited]
        self.goes_on = bool(writes) and not is_last
        if not writes:
            return canvas
        changing = [place for place in writes if tokens[place] != (mask if canvas[place] is None else canvas[place])]
        if tuple(canvas) in self.seen and changing and not is_last:
            place = min(changing, key=lambda place: (confidence[place], place))
            barred = self.written[place] | ({mask} if is_original_mask[place] else set())
            tokens[place] = _best_but(looks[place], barred)
        self.seen.add(tuple(canvas))
        for place in writes:
            self.written[place].add(tokens[place])
        return self._moved(canvas, {place: tokens[place] for place in writes}, mask)

    def _masks(self, canvas: Canvas, is_original_mask: list[bool], confidence: list[float]) -> list[int]:
        """Return the masks that a step writes, unless it is the last."""
        masks = masked(canvas)
        if not any(is_original_mask):
            return masks
        least = 1 + len(masks) - sum(is_original_mask)
        sure = [place for place in masks if confidence[place] > self.threshold]
        return sure if len(sure) >= least else best(masks, confidence, least)

    def _is_last(self, canvas: Canvas, is_original_mask: list[bool], chosen: list[int]) -> bool:
        """Tell whether a step, which is counted, is the last."""
        has_original = any(is_original_mask)
        self.num_updates += 1
        self.num_post += not has_original
        writes_all = all(place in chosen for place, is_it in enumerate(is_original_mask) if is_it)
        return (
            (self.num_post >= self.post_steps if not has_original else self.post_steps == 0 and writes_all)
            or self.num_updates > len(canvas) + self.post_steps
        )  # fmt: skip

    def _moved(self, canvas: Canvas, written: dict[int, int], mask: int) -> Canvas:
        """Return the canvas where tokens were written, and move those behind a deletion or an insertion."""
        moved: list[tuple[int | None, bool]] = []
        for place, (token, is_original) in enumerate(zip(canvas, self.is_original, strict=True)):
            taken = written.get(place, mask if token is None else token)
            if place in written and taken == self.delete:
                continue
            if place in written and taken == self.split:
                moved += [(None, False), (token, is_original)]
            else:
                moved.append((None if taken == mask else taken, is_original))
        moved += [(None, False)] * len(canvas)
        after, self.is_original = map(list, zip(*moved[: len(canvas)], strict=True))
        return after


def _prediction(look: Look, is_original_mask: bool) -> tuple[int, float]:
    """Return the likeliest of all tokens and its probability; of an original mask, which is none itself, the next."""
    probs = look.logits.softmax(0)
    token = int(look.logits.argmax())
    if is_original_mask and token == look.mask_token_id:
        token = _best_but(look, {token})
    return token, float(probs[token])


def _best_but(look: Look, barred: set[int]) -> int:
    return int(look.logits.index_fill(0, torch.tensor(sorted(barred), dtype=torch.int64), -torch.inf).argmax())
