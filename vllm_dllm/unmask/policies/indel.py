"""LLaDA2.2 (inclusionAI), by SGLang's `JointThresholdInDel`: tokens are replaced, deleted and inserted."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_dllm.unmask.memory import PolicyState, StateField
from vllm_dllm.unmask.parameter import Parameter
from vllm_dllm.unmask.torch_policy import Decision, Seen, TorchPolicy, Unwritten, highest

MAX_POST_STEPS = 32
_LARGEST_ID = 2**31 - 1


def _num_updates(block_length: int) -> int:
    """Return how many canvases of a block are written in at most."""
    return block_length + MAX_POST_STEPS + 1


def _decide(seen: Seen, state: PolicyState) -> Decision:
    """Write masks and replace written tokens, then move those behind a deletion or an insertion.

    What the names mean, and the rule, is in `reference.indel_rule`.
    """
    is_original = torch.where(seen.step[:, None] == 0, seen.is_masked, state["is_original"][..., 0])
    its = _Prediction.of(seen, is_original & seen.is_masked)
    chosen = _masks(seen, its)
    num_post = state["num_post"][:, 0, 0] + ~its.is_original_mask.any(1)
    is_last = _is_last(seen, its, chosen, num_post)
    chosen = (chosen | (seen.is_masked & is_last[:, None])) & seen.is_open
    token = torch.where(is_last[:, None] & its.is_barred, its.ordinary, its.token)
    edited = seen.is_written & (its.confidence > seen.values["edit_threshold"][:, None]) & (token != seen.canvas)
    writes = chosen | edited
    changing = writes & (token != seen.canvas)
    repeats = ~_is_new(seen.canvas, state) & changing.any(1) & ~is_last
    place = torch.where(changing, its.confidence, torch.inf).argmin(1, keepdim=True)
    token = token.scatter(1, place, torch.where(repeats[:, None], its.other(state), token).gather(1, place))
    canvas, is_original = _moved(seen, writes, torch.where(writes, token, seen.canvas), is_original)
    is_known = (state["written"] == token[..., None]).any(-1)
    kept = {
        "is_original": is_original[..., None],
        "num_post": num_post[:, None, None],
        "seen": _put(state["seen"], seen.step, seen.canvas),
        "written": _put(state["written"], seen.step, torch.where(writes & ~is_known, token, -1)),
    }
    return Decision(canvas, kept, is_last | ~writes.any(1))


@dataclass(frozen=True, slots=True)
class _Prediction:
    """What positions would take; all [num_canvases, B]."""

    is_original_mask: Tensor  # bool
    token: Tensor  # int64, the likeliest of all, of an original mask the likeliest besides the mask token
    confidence: Tensor  # float64, its probability among all
    is_barred: Tensor  # bool, whether no last step may write that
    ordinary: Tensor  # int64, the likeliest that it may
    unwritten: Tensor  # [num_canvases, B, 3] float64, `PartialStats.others`
    mask_token_id: int

    @classmethod
    def of(cls, seen: Seen, is_original_mask: Tensor) -> "_Prediction":
        """Read the rows, whose candidates leave the mask token out."""
        rows, shape = seen.rows, seen.canvas.shape
        assert rows.others is not None, "the policy declares what it asks for"
        others, mask = rows.others.view(*shape, 3), seen.mask_token_id
        ids, top, rest = (
            rows.top_ids.view(*shape, -1),
            rows.top_logits[:, 0].double().view(shape),
            rows.rest.view(shape),
        )
        above = others[..., 0] - top  # of the mask token's logit
        takes_mask = ((above > 0) | ((above == 0) & (mask < ids[..., 0]))) & ~is_original_mask
        token = torch.where(takes_mask, mask, ids[..., 0])
        probability = 1.0 / torch.where(takes_mask, 1.0 + (1.0 + rest) * (-above).exp(), 1.0 + rest + above.exp())
        edits = [seen.values[name].long()[:, None] for name in ("delete", "split")]
        is_barred = (token == mask) | (token == edits[0]) | (token == edits[1])
        first = ((ids != edits[0][..., None]) & (ids != edits[1][..., None])).byte().argmax(-1, keepdim=True)
        ordinary = ids.gather(-1, first)[..., 0]
        return cls(is_original_mask, token, probability, is_barred, ordinary, others, mask)

    def other(self, state: PolicyState) -> Tensor:
        """Return the likeliest token that each position never took; int64."""
        mask_logit, token, logit = self.unwritten.unbind(-1)
        may_mask = ~self.is_original_mask & ~(state["written"] == self.mask_token_id).any(-1)
        is_mask = (mask_logit > logit) | ((mask_logit == logit) & (self.mask_token_id < token))
        return torch.where(may_mask & is_mask, self.mask_token_id, token.long().clamp(min=0))


def _masks(seen: Seen, its: _Prediction) -> Tensor:
    """Return the masks that a step writes, unless it is the last; [num_canvases, B] bool."""
    least = 1 + (seen.is_masked & ~its.is_original_mask).sum(1)
    sure = seen.is_masked & (its.confidence > seen.params.threshold[:, None])
    has_enough = sure.sum(1) >= least
    chosen = torch.where(has_enough[:, None], sure, highest(its.confidence, least, seen.is_masked))
    return torch.where(its.is_original_mask.any(1, keepdim=True), chosen, seen.is_masked)


def _is_last(seen: Seen, its: _Prediction, chosen: Tensor, num_post: Tensor) -> Tensor:
    """Tell of which blocks a step is the last; [num_canvases] bool."""
    post_steps, length = seen.values["post_steps"], seen.canvas.shape[1]
    writes_all = ~(its.is_original_mask & ~chosen).any(1)
    has_original = its.is_original_mask.any(1)
    is_last = torch.where(has_original, (post_steps == 0) & writes_all, num_post >= post_steps)
    return is_last | (seen.step + 1 > length + post_steps)


def _moved(seen: Seen, writes: Tensor, after: Tensor, is_original: Tensor) -> tuple[Tensor, Tensor]:
    """Delete and insert; returns the canvases, and which of their positions are original."""
    length, mask = after.shape[1], seen.mask_token_id
    is_delete, is_split = (writes & (after == seen.values[name].long()[:, None]) for name in ("delete", "split"))
    end = (1 - is_delete.long() + is_split.long()).cumsum(1)
    place = torch.arange(length, device=after.device).expand_as(after).contiguous()
    source = torch.searchsorted(end, place, right=True)
    is_there, source = source < length, source.clamp(max=length - 1)
    is_split = is_split.gather(1, source)
    is_second = is_split & (place == end.gather(1, source) - 1)
    token = torch.where(is_second, seen.canvas.gather(1, source), after.gather(1, source))
    is_token = is_there & (is_second | ~is_split)
    return torch.where(is_token, token, mask), is_token & is_original.gather(1, source)


def _is_new(canvas: Tensor, state: PolicyState) -> Tensor:
    """Tell which canvases [num_canvases, B] no step of their blocks has written in; [num_canvases] bool."""
    return ~(state["seen"] == canvas[..., None]).all(1).any(1)


def _put(kept: Tensor, step: Tensor, values: Tensor) -> Tensor:
    """Return [num_canvases, B, width] with values [num_canvases, B] in the place of a step [num_canvases]."""
    place = step.clamp(max=kept.shape[2] - 1)[:, None, None].expand(*values.shape, 1)
    return kept.scatter(2, place, values[..., None].to(kept.dtype))


INDEL = TorchPolicy(
    _decide,
    source="LLaDA2.2, sgl-project/sglang",
    takes=("threshold",),
    parameters={
        "edit_threshold": Parameter(0.0, "confidence above which a written token is replaced, deleted or split"),
        "post_steps": Parameter(16, "steps of a block without original masks", high=MAX_POST_STEPS, is_whole=True),
        "delete": Parameter(156930, "token that takes its place away", high=_LARGEST_ID, is_whole=True),
        "split": Parameter(156931, "token that puts a mask before another", high=_LARGEST_ID, is_whole=True),
    },
    state={
        "is_original": StateField(1, torch.bool, 0),
        "num_post": StateField(1, torch.int64, 0, "block"),  # steps without original masks
        "seen": StateField(_num_updates, torch.int32, -1),  # canvases that were written in
        "written": StateField(_num_updates, torch.int32, -1),  # each token that a position took, once
    },
    tokens_change=True,
    ends_itself=True,
    unwritten=Unwritten("written", _is_new),
)
