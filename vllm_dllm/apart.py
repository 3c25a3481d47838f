"""Requests whose policy has no native twin, decided once more beside the others of their step; and who has to end."""

import logging
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from vllm_dllm.arrays import to_device
from vllm_dllm.constraint.step import ConstrainedStep
from vllm_dllm.ops.vocab_stats import PartialStats
from vllm_dllm.state.apart import Group
from vllm_dllm.state.canvas import Blocks, CanvasState
from vllm_dllm.state.report import Failed
from vllm_dllm.unmask.registry import is_users
from vllm_dllm.unmask.stats import candidates_of
from vllm_dllm.unmask.torch_policy import PolicyFault
from vllm_dllm.unmask.walk import Keep, Kept, Nodes, Trajectory, walk

logger = logging.getLogger("vllm.dllm")


@dataclass(frozen=True, slots=True)
class DecidedStep:
    """A step of which all requests but those with policies in torch code were decided.

    Attributes:
        state: of the canvases.
        blocks: of the requests.
        nodes: what was evaluated.
        stats: of the rows.
        keep: which of all requests' chosen positions take their tokens; None: all.
    """

    state: CanvasState
    blocks: Blocks
    nodes: Nodes
    stats: PartialStats
    keep: Keep | None

    def others(self, done: Trajectory) -> Trajectory:
        """Return what the step comes to where the requests with policies in torch code do as these say.

        A request at which its policy, a user's, fails stays where it is and is marked; so is one that its constraint
        leaves nothing to do.

        Args:
            done: what the other requests did; what it says of these means nothing.
        """
        for group in self.state.apart.groups(self.blocks.slots_np):
            walked, left, failed = self._walk(group) if is_users(group.name) else (self._walk_all(group), group, ())
            if walked is not None:
                request = self._index(left)
                kept = Kept(left.name, request, walked.state, walked.ended)
                unread = {name: its[request] for name, its in done.state.items()}
                done = replace(done.with_those(request, replace(walked, state=unread)), apart=(*done.apart, kept))
            if failed:
                done = self._stay(done, dict.fromkeys(failed, Failed.POLICY))
        own = self.nodes.constrained
        return self._stay(done, own.failed) if own is not None and own.failed else done

    def _walk(self, group: Group) -> tuple[Trajectory | None, Group, tuple[int, ...]]:
        """Walk with a user's policy; returns what came of it, of whom, and the requests at which it failed."""
        failed: list[int] = []
        while len(group.request):
            try:
                return self._walk_all(group), group, tuple(failed)
            except Exception as error:
                of = error.of if isinstance(error, PolicyFault) else None
                faulty = self._raises(group) if of is None else of.numpy()
                trace = None if isinstance(error, PolicyFault) else error
                logger.error("Policy %r fails, %d requests end: %s", group.name, faulty.sum(), error, exc_info=trace)
            failed += group.request[faulty].tolist()
            group = replace(group, request=group.request[~faulty])
        return None, group, tuple(failed)

    def _raises(self, group: Group) -> np.ndarray:
        """Find out at which requests of a group a policy raises; [num_some] bool, one at least."""
        faulty = np.zeros(len(group.request), dtype=bool)
        for place in range(len(group.request)):
            try:
                self._walk_all(replace(group, request=group.request[place : place + 1]))
            except Exception:  # noqa: BLE001 - whatever it is, it was logged or will be
                faulty[place] = True
        return faulty if faulty.any() else ~faulty  # what raises for several alone is nobody's in particular

    def _walk_all(self, group: Group) -> Trajectory:
        theirs, request = self.blocks.of(group.request), self._index(group)
        return walk(
            self.nodes.of(request),
            self.nodes.rows(self.stats, request),
            self.state.apart_params(theirs, group.name),
            self.state.mask_token_id,
            self.state.rules,
            self.state.apart.state(group.name, theirs.slots),
            None if self.keep is None else _among(self.keep, request, len(self.blocks.slots_np)),
        )

    def _stay(self, done: Trajectory, failed: dict[int, Failed]) -> Trajectory:
        """Leave requests where they are."""
        request = torch.tensor([*failed], device=done.canvas.device)
        canvas, zeros = self.nodes.canvas[request, 0], torch.zeros_like(done.node[request])
        of_nodes = candidates_of(self.nodes.rows(self.stats, request)).view(len(request), *self.nodes.canvas.shape[1:])
        stays = replace(
            done,
            canvas=canvas,
            next_canvas=canvas,
            path=torch.full_like(done.path[request], -1),
            step=torch.full_like(canvas, -1),
            node=zeros,
            num_steps=zeros,
            num_unmasked=zeros,
            is_finished=zeros.bool(),
            came_over=zeros.bool(),
            candidates=of_nodes.of((slice(None), 0)),  # the roots'
            state={name: its[request] for name, its in done.state.items()},
        )
        return replace(done.with_those(request, stays), failed=done.failed | failed)

    def _index(self, group: Group) -> Tensor:
        return to_device(group.request, self.blocks.slots.device)


def _among(keep: Keep, request: Tensor, num_reqs: int) -> Keep:
    """Return what `keep` of all requests says of some."""

    def kept(*of_some: Tensor) -> Tensor:
        of_all = [its.new_zeros(num_reqs, *its.shape[1:]).index_copy(0, request, its) for its in of_some]
        return keep(*of_all)[request]

    return kept


def keep_of(edits: Keep | None, own: ConstrainedStep | None) -> Keep | None:
    """Return what keeps positions masked for all requests of a step: words that are barred, and constraints.

    Args:
        edits: of all requests; None: nothing.
        own: of the requests under a constraint; None: there are none.
    """
    if own is None:
        return edits

    def kept(node: Tensor, chosen: Tensor, score: Tensor, tokens: Tensor) -> Tensor:
        if edits is not None:
            chosen = edits(node, chosen, score, tokens)
        theirs = to_device(own.request, node.device)
        return chosen.index_copy(0, theirs, own.keep(*(its[theirs] for its in (node, chosen, score, tokens))))

    return kept
