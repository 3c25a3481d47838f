"""Parameters and memories of requests whose policy has no native twin, by slot."""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vllm_dllm.arrays import to_device, write
from vllm_dllm.state.policy_weights import load_weights
from vllm_dllm.unmask.memory import PolicyState
from vllm_dllm.unmask.parameter import MAX_PARAMETERS
from vllm_dllm.unmask.policy import OwnParams
from vllm_dllm.unmask.registry import changes_tokens, file_options, torch_policy

logger = logging.getLogger("vllm.dllm")

_ASKS = ("asks_known", "asks_ends")

KEPT = 3
"""Begins of blocks of which is remembered what a policy knew of its request then: the one under way, and two before it,
which steps under way may have ended that the scheduler does not know of as it preempts the request."""


@dataclass(frozen=True, slots=True)
class Begun:
    """What a policy knew of a request when its last blocks began, the latest first."""

    start: Tensor  # [KEPT] int64, absolute positions where they began
    state: PolicyState  # [KEPT, width] each, of fields that live as long as a request

    def of(self, field: str, start: int) -> Tensor:
        """Return a field when the block began at `start`; [1, width]. Steps behind may be unknown to the scheduler."""
        return self.state[field].index_select(0, (self.start == start).byte().argmax()[None])


@dataclass(frozen=True, slots=True)
class Group:
    """The requests of a step that have the same policy."""

    name: str
    request: np.ndarray  # [num_some] int64, which of the step's requests


class ApartState:
    """What policies in torch code take and keep, of up to `max_num_reqs` requests.

    Args:
        max_num_reqs: slots.
        block_length: positions per block.
        device: of all tensors.
        vocab_size: of the model.
        files: setting -> path of a net that a policy looks at. Raises ConfigError for those that cannot be loaded.
    """

    def __init__(
        self, max_num_reqs: int, block_length: int, device: torch.device, vocab_size: int, files: Mapping[str, str]
    ) -> None:
        self._weights: dict[str, dict[str, Tensor]] = {}  # by policy
        for option, path in files.items():
            net = load_weights(option, path, block_length, device)
            self._weights |= dict.fromkeys(file_options()[option], net)
        self._max_num_reqs, self._block_length, self._device = max_num_reqs, block_length, device
        self._vocab_size = vocab_size
        self._names: dict[int, str] = {}
        self._values_np = np.zeros((MAX_PARAMETERS, max_num_reqs))
        self._values = torch.zeros(self._values_np.shape, dtype=torch.float64, device=device)
        self._is_staged = False
        self._memory: dict[str, PolicyState] = {}  # of policies that were used -> fields of [max_num_reqs, ...]
        # Of fields that live as long as a request, [max_num_reqs, KEPT, width], and where those blocks began.
        self._begun: dict[str, PolicyState] = {}
        self._start = torch.zeros(max_num_reqs, KEPT, dtype=torch.int64, device=device)
        self._owners: dict[int, str] = {}  # of slots whose policies have such fields, the requests
        self._aside: dict[str, Begun] = {}  # of those that lost their slots and have not ended

    def put(self, slot: int, name: str | None, values: Sequence[float], request_id: str, start: int = 0) -> None:
        """Take a request's policy and its parameters; None: it has a native twin.

        One that was preempted finds what its policy knew of it when the block began that comes next.

        Args:
            slot: of the request.
            name, values: of the policy.
            request_id: of the request.
            start: absolute position where its next block begins.
        """
        self._put_aside(slot)
        self._names.pop(slot, None)
        if name is None:
            return
        self._names[slot] = name
        self._values_np[: len(values), slot] = values
        self._is_staged = True
        fields = torch_policy(name).fields
        for field, its in self._of(name).items():
            its[slot] = fields[field].empty
        if not self._begun[name]:
            return
        for former in [its for its, owner in self._owners.items() if owner == request_id]:
            self._put_aside(former)
        self._owners[slot] = request_id
        before = self._aside.pop(request_id, None)
        self._start[slot] = start
        for field, its in self._begun[name].items():
            its[slot] = fields[field].empty if before is None else before.of(field, start)
            self._memory[name][field][slot] = its[slot, :1]

    def _put_aside(self, slot: int) -> None:
        """Remember what lives as long as the request of a slot, which may come back."""
        owner = self._owners.pop(slot, None)
        if owner is not None:
            begun = {field: its[slot].clone() for field, its in self._begun[self._names[slot]].items()}
            self._aside[owner] = Begun(self._start[slot].clone(), begun)

    @property
    def remembered(self) -> set[str]:
        """Requests of which anything is remembered beyond their steps."""
        return {*self._owners.values(), *self._aside}

    def forget(self, request_ids: Collection[str]) -> None:
        """Forget requests that have ended, which may be unknown: they do not come back."""
        for request_id in request_ids if self._owners or self._aside else ():
            self._aside.pop(request_id, None)
        for slot in [slot for slot, owner in self._owners.items() if owner in request_ids]:
            del self._owners[slot]

    def apply_staged_writes(self) -> None:
        """Copy what was staged to the device."""
        if self._is_staged:
            write(self._values_np, self._values)
            self._is_staged = False

    def groups(self, slots_np: np.ndarray) -> list[Group]:
        """Return the requests among those of some slots that have such policies, by policy."""
        if not self._names:
            return []
        names = [self._names.get(slot) for slot in slots_np.tolist()]
        return [
            Group(name, np.flatnonzero([own == name for own in names]))
            for name in dict.fromkeys(names)
            if name is not None
        ]

    def asks(self, slots_np: np.ndarray) -> np.ndarray:
        """Tell whose policies look at logits of known tokens, and whose at those of end tokens; [2, num_reqs] bool."""
        if not self._names:
            return np.zeros((2, len(slots_np)), dtype=bool)
        asking = [torch_policy(self._names[slot]) if slot in self._names else None for slot in slots_np.tolist()]
        return np.array([[its is not None and getattr(its, what) for its in asking] for what in _ASKS], dtype=bool)

    def written(self, slots: Tensor, slots_np: np.ndarray) -> Tensor | None:
        """Return what positions took of policies that ask for what they did not; [num_reqs, block_length, n] ids.

        -1 for none; None where no policy asks.
        """
        found = None
        for group in self.groups(slots_np):
            unwritten = torch_policy(group.name).unwritten
            if unwritten is not None:
                index = to_device(group.request, slots.device)
                its = self._of(group.name)[unwritten.field][slots[index]]
                assert found is None, "one policy asks"
                found = its.new_full((len(slots), *its.shape[1:]), -1).index_copy(0, index, its)
        return found

    def may_edit(self, slots_np: np.ndarray) -> np.ndarray:
        """Tell of whom a canvas without masks may be unfinished; [num_reqs] bool."""
        return np.array([slot in self._names and changes_tokens(self._names[slot]) for slot in slots_np.tolist()])

    def params(self, name: str, slots: Tensor, prompt_len: Tensor, seq_len: Tensor) -> OwnParams:
        """Gather the parameters of requests with a policy."""
        own = torch_policy(name).parameters
        values = dict(zip(own, self._values[:, slots], strict=False))
        return OwnParams(name, values, prompt_len, seq_len, self._vocab_size, self._weights.get(name, {}))

    def state(self, name: str, slots: Tensor) -> PolicyState:
        """Gather what a policy keeps of requests."""
        return {field: its[slots] for field, its in self._of(name).items()}

    def keep(self, name: str, slots: Tensor, state: PolicyState, begins: Tensor) -> None:
        """Keep what a policy knows of requests; `begins` [num_some] bool marks those of whom a block begins."""
        anew = torch_policy(name).of_next_block(state)
        for field, its in self._of(name).items():
            its[slots] = torch.where(begins[:, None, None], anew[field], state[field])

    def keep_ended(self, name: str, slots: Tensor, ended: PolicyState, is_finished: Tensor, behind: Tensor) -> None:
        """Keep what requests go on with after a preemption: what a policy knew when their last blocks ended.

        Args:
            name: of the policy.
            slots: of the requests.
            ended: of the block that a step began with, before the next one's root was decided.
            is_finished: [num_some] bool, whose block ended.
            behind: [num_some] int64, absolute position behind it.
        """
        if not self._begun[name]:
            return

        def pushed(kept: Tensor, new: Tensor) -> Tensor:
            return torch.where(is_finished.view(-1, *[1] * (kept.dim() - 1)), torch.cat([new, kept[:, :-1]], 1), kept)

        self._start[slots] = pushed(self._start[slots], behind[:, None])
        for field, its in self._begun[name].items():
            its[slots] = pushed(its[slots], ended[field])

    def _of(self, name: str) -> PolicyState:
        if name not in self._memory:
            logger.info("Requests with the policy %r are decided in torch, beside those of native policies.", name)
            policy = torch_policy(name)
            fields = policy.new_state(self._max_num_reqs, self._block_length, self._device)
            self._memory[name] = fields
            self._begun[name] = {
                field: its.repeat(1, KEPT, 1) for field, its in fields.items() if policy.fields[field].per == "request"
            }
        return self._memory[name]
