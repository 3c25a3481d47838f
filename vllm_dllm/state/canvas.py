"""The blocks being denoised and the parameters of their requests, as slot-indexed tensors.

A slot belongs to a request from `add_request` until the runner gives it to another one. Parameters are written on the
host and copied by `apply_staged_writes`, two copies for all of them; the canvases live on the device alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from vllm_dllm.arrays import to_device, write
from vllm_dllm.constraint.answer import Answer
from vllm_dllm.draft.propose import DraftNoise
from vllm_dllm.noise import stream_keys
from vllm_dllm.ops.vocab_stats import RowSampling
from vllm_dllm.state.apart import ApartState
from vllm_dllm.state.edits import EditState, scene_of
from vllm_dllm.state.ends import EndState
from vllm_dllm.state.guidance import GuidanceState
from vllm_dllm.state.pins import PinState
from vllm_dllm.state.records import LogprobRecords
from vllm_dllm.state.request_params import RequestParams
from vllm_dllm.state.targets import TargetState
from vllm_dllm.unmask.edits import RowEdits
from vllm_dllm.unmask.memory import PolicyState, select
from vllm_dllm.unmask.policy import MEMORIES, POLICY_IDS, PolicyParams, new_state
from vllm_dllm.unmask.schedule import UnmaskRules
from vllm_dllm.unmask.walk import Keep, Nodes


@dataclass(frozen=True, slots=True)
class Blocks:
    """The active blocks of some requests."""

    slots: Tensor  # [num_reqs] int64, without repetition
    slots_np: np.ndarray  # the same on the host
    start: Tensor  # [num_reqs] int64, absolute position of each block

    def of(self, request: np.ndarray) -> "Blocks":
        """Return those of some requests [num_some] int64."""
        index = to_device(request, self.slots.device)
        return Blocks(self.slots[index], self.slots_np[request], self.start[index])


_INTS = ("policy_id", "prompt_len", "seq_len", "horizon", "top_k", "seed")
_CREDIT = ("credit_alpha", "credit_beta", "credit_gamma")
_FLOATS = ("threshold", "factor", "entropy_bound", "position_penalty", *_CREDIT, "alg_temp", "temperature", "top_p")


class CanvasState:
    """Canvases and parameters of up to `max_num_reqs` requests.

    Args:
        max_num_reqs: slots.
        block_length: positions per block.
        mask_token_id: what stands for masked in a canvas.
        device: of all tensors.
        rules: of the model's family.
        left: [max_num_reqs, hidden_size] of a model with a logit shift, else None: the hidden row left of each block
            (its left context), which predicts the block's first token.
        vocab_size: of the model; a user's policy may not write other tokens.
        files: of nets that policies look at, by setting.
    """

    def __init__(
        self,
        max_num_reqs: int,
        block_length: int,
        mask_token_id: int,
        device: torch.device,
        rules: UnmaskRules = UnmaskRules(),  # noqa: B008 - a frozen value
        left: Tensor | None = None,
        vocab_size: int = 2**62,
        files: Mapping[str, str] = {},
    ) -> None:
        self.rules = rules
        self.block_length = block_length
        self.mask_token_id = mask_token_id
        self.device = device
        self.vocab_size = vocab_size
        self.left = left
        # [max_num_reqs, block_length]: the active block. The mask token is never chosen, so it stands for masked alone.
        self.canvas = torch.full((max_num_reqs, block_length), mask_token_id, dtype=torch.int64, device=device)
        # What policies remember: fields of [max_num_reqs, block_length, width].
        self.memory = new_state(max_num_reqs, block_length, device)
        self._has_memory_np = np.zeros(max_num_reqs, dtype=bool)
        # Rows: a parameter each, then the request's table, `counts` or `times`.
        self._ints_np = np.zeros((len(_INTS) + block_length, max_num_reqs), dtype=np.int64)
        self._floats_np = np.zeros((len(_FLOATS) + block_length, max_num_reqs), dtype=np.float64)
        self._ints = torch.zeros(self._ints_np.shape, dtype=torch.int64, device=device)
        self._floats = torch.zeros(self._floats_np.shape, dtype=torch.float64, device=device)
        self._is_staged = False
        self.guidance = GuidanceState(max_num_reqs, device)
        self.edits = EditState(max_num_reqs, block_length, mask_token_id, device)
        self.ends = EndState(max_num_reqs, device)
        self.targets = TargetState(block_length, device)
        self.pins = PinState(block_length, device)
        self.records = LogprobRecords(max_num_reqs, block_length, device)
        self.apart = ApartState(max_num_reqs, block_length, device, vocab_size, files)
        self._offsets = torch.arange(block_length, device=device)
        self.answers: dict[int, Answer] = {}  # of requests under a constraint, by slot

    def add_request(self, slot: int, params: RequestParams, answer: Answer | None = None, start: int = 0) -> None:
        """Stage a request's parameters; its canvas is masked by `reset` when its first block begins.

        Args:
            slot, params: of the request.
            answer: what its answer has to meet, and how far that is; None: nothing.
            start: absolute position where its first block begins, or after a preemption its next one.
        """
        self.answers.pop(slot, None)
        if answer is not None:
            self.answers[slot] = answer
        self._ints_np[:, slot] = [getattr(params, name) for name in _INTS] + list(params.counts)
        self._floats_np[:, slot] = [getattr(params, name) for name in _FLOATS] + list(params.times)
        self._has_memory_np[slot] = params.policy_id in MEMORIES
        self.edits.put(slot, params.edits)
        self.ends.put(slot, params.ends)
        self.guidance.put(slot, params.cfg_scale, params.prompt_len)
        self.pins.put(slot, params.pins)
        self.targets.put(slot, params.targets)
        self.records.put(slot, params.num_logprobs, keeps_mask=params.targets is not None)
        self.apart.put(slot, params.own_policy, params.own_values, params.request_id, start)
        self._is_staged = True

    def apply_staged_writes(self) -> None:
        """Copy the parameters staged since the last call to the device."""
        for each in (self.edits, self.ends, self.guidance, self.apart):
            each.apply_staged_writes()
        if self._is_staged:
            write(self._ints_np, self._ints)
            write(self._floats_np, self._floats)
            self._is_staged = False

    @property
    def seq_len(self) -> Tensor:
        """[max_num_reqs] int64, positions of the prompt and the whole generation."""
        return self._int("seq_len")

    @property
    def seq_len_np(self) -> np.ndarray:
        """[max_num_reqs] int64 on the host."""
        row: np.ndarray = self._ints_np[_INTS.index("seq_len")]
        return row

    def seq_end_np(self, slots_np: np.ndarray, block_start: np.ndarray) -> np.ndarray:
        """Return where the sequences of requests end while their blocks begin at `block_start`, [num_reqs] each."""
        horizon = self._ints_np[_INTS.index("horizon"), slots_np]
        end: np.ndarray = np.minimum(self.seq_len_np[slots_np], block_start + horizon)
        return end

    def policy_params(self, blocks: Blocks) -> PolicyParams:
        """Gather the policies of some requests."""
        slots_np = blocks.slots_np
        ints, floats = self._ints[:, blocks.slots], self._floats[:, blocks.slots]
        own_ints, own_floats = (dict(zip(*pair, strict=False)) for pair in ((_INTS, ints), (_FLOATS, floats)))
        policies = set(self._ints_np[_INTS.index("policy_id"), slots_np].tolist())
        return PolicyParams(
            policy_id=own_ints["policy_id"],
            seed=own_ints["seed"],
            prompt_len=self.pins.known_end(own_ints["prompt_len"], slots_np, blocks.start),
            start=blocks.start,
            threshold=own_floats["threshold"],
            factor=own_floats["factor"],
            entropy_bound=own_floats["entropy_bound"],
            **{name: own_floats[name] for name in _CREDIT},
            alg_temp=own_floats["alg_temp"],
            temperature=own_floats["temperature"],
            counts=ints[len(_INTS) :],
            times=floats[len(_FLOATS) :],
            policies=tuple(name for name, policy_id in POLICY_IDS.items() if policy_id in policies),
            has_alg_temp=bool((self._floats_np[_FLOATS.index("alg_temp"), slots_np] > 0).any()),
        )

    def apart_params(self, blocks: Blocks, name: str) -> PolicyParams:
        """Gather the parameters of requests that have the same policy without a native twin."""
        lengths = self._int("prompt_len")[blocks.slots], self.seq_len[blocks.slots]
        own = self.apart.params(name, blocks.slots, *lengths)
        return replace(self.policy_params(blocks), own=own)

    def asks(self, blocks: Blocks) -> Tensor | None:
        """Tell whose policies ask for logits of known tokens, and of end tokens; [2, num_reqs] bool; None: nobody's."""
        asks = self.apart.asks(blocks.slots_np)
        return to_device(asks, self.device) if asks.any() else None

    def window_rule(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Gather the entropy bounds and position penalties of some requests; two [num_reqs] float64."""
        return self._float("entropy_bound")[slots], self._float("position_penalty")[slots]

    def has_memory(self, slots_np: np.ndarray) -> bool:
        """Tell whether the policy of any of some requests remembers something."""
        return bool(self._has_memory_np[slots_np].any())

    def policy_state(self, blocks: Blocks) -> PolicyState:
        """Gather what the policies of some requests remember; empty where none remembers anything."""
        if not self.has_memory(blocks.slots_np):
            return {}
        return {name: field[blocks.slots] for name, field in self.memory.items()}

    def remember(self, slots: Tensor, state: PolicyState) -> None:
        """Keep what policies remember of their blocks from now on."""
        for name, field in state.items():
            self.memory[name][slots] = field

    def row_edits(
        self, blocks: Blocks, nodes: Nodes, fronts: tuple[Tensor, Tensor] | None = None
    ) -> tuple[RowEdits | None, Keep | None]:
        """Return what requests ask of the logits of their evaluated canvases' rows, and which positions wait.

        Args:
            blocks: of the requests.
            nodes: their canvases.
            fronts: where the known tokens of requests end, [num_reqs] int64, and what the canvases' drafts know from
                there on, as in `state.edits.Scene`; None: nothing.
        """
        slots, slots_np = blocks.slots, blocks.slots_np
        if not self.edits.is_edited_np[slots_np].any():
            return None, None
        lengths = self._int("prompt_len")[slots], self._int("seq_len")[slots], int(self.seq_len_np[slots_np].max())
        scene = scene_of(nodes, slots, blocks.start, *lengths, self.mask_token_id)
        if fronts is not None:
            scene = replace(scene, begin=fronts[0], front=fronts[1])
        return self.edits.rows(slots, slots_np, scene)

    def is_sampled(self, slots_np: np.ndarray) -> bool:
        """Tell whether any of some requests has a temperature above 0."""
        return bool((self._sampling_np(slots_np)[0] > 0).any())

    def row_sampling(self, slots_np: np.ndarray, slots: Tensor, start: Tensor, num_masked: Tensor) -> RowSampling:
        """Gather how the rows of some canvases are sampled.

        Args:
            slots_np: [num_reqs], of the canvases' requests.
            slots: [num_canvases] int64.
            start: [num_canvases] int64, absolute position of each one's block.
            num_masked: [num_canvases] int64, masked positions of each.

        Returns: rows in the order of canvases, positions.
        """
        keys = stream_keys(self._int("seed")[slots, None], start[:, None] + self._offsets, num_masked[:, None])

        def per_row(per_request: Tensor) -> Tensor:
            return per_request[slots, None].expand_as(keys).flatten()

        return RowSampling(
            temperature=per_row(self._float("temperature")),
            top_k=per_row(self._int("top_k")),
            top_p=per_row(self._float("top_p")),
            keys=keys.flatten(),
            has_filter=self.has_filter(slots_np),
            wants_sampled=self.wants_sampled,
        )

    @property
    def draw_params(self) -> list[Tensor]:
        """What `row_sampling` gathers, of all slots: seed, top_k, temperature and top_p."""
        return [*map(self._int, ("seed", "top_k")), *map(self._float, ("temperature", "top_p"))]

    @property
    def wants_sampled(self) -> bool:
        """Whether policies look at the sampled distribution."""
        return self.rules.confidence == "sampled"

    def has_filter(self, slots_np: np.ndarray) -> bool:
        """Tell whether top_k or top_p removes something of any of some requests."""
        temperature_np, has_top_k, has_top_p = self._sampling_np(slots_np)
        return bool(((temperature_np > 0) & (has_top_k | has_top_p)).any())

    def draft_noise(self, blocks: Blocks) -> DraftNoise | None:
        """Gather what the requests' draws depend on; None when all are greedy and none has the policy `random`."""
        if not self._has_draft_noise(blocks):
            return None
        return DraftNoise(
            seed=self._int("seed")[blocks.slots],
            position=self.positions(blocks),
            temperature=self._float("temperature")[blocks.slots],
            top_k=self._int("top_k")[blocks.slots],
            top_p=self._float("top_p")[blocks.slots],
            is_random=self._int("policy_id")[blocks.slots] == POLICY_IDS["random"],
        )

    def draft_params(self, blocks: Blocks) -> list[Tensor]:
        """Return what `draft_noise` gathers, of all slots: policy, seed, top_k, temperature and top_p; or nothing."""
        if not self._has_draft_noise(blocks):
            return []
        return [*map(self._int, ("policy_id", "seed", "top_k")), *map(self._float, ("temperature", "top_p"))]

    def _has_draft_noise(self, blocks: Blocks) -> bool:
        temperature_np, _, _ = self._sampling_np(blocks.slots_np)
        policy_np = self._ints_np[_INTS.index("policy_id")][blocks.slots_np]
        return bool((temperature_np > 0).any() or (policy_np == POLICY_IDS["random"]).any())

    def positions(self, blocks: Blocks) -> Tensor:
        """Return the absolute positions of the blocks; [num_reqs, block_length] int64."""
        return blocks.start[:, None] + self._offsets

    @property
    def keeps_left(self) -> bool:
        """Whether a block's first position is predicted by a row that is kept from a refresh."""
        return self.left is not None

    def predicting_rows(self, slots: Tensor, hidden: Tensor, fresh: Tensor | None) -> Tensor:
        """Put the row left of each block, which a refresh computed last, before its other rows; returns `hidden`.

        Args:
            slots: [num_nodes] int64.
            hidden: [num_nodes * block_length, hidden_size], the rows left of the positions of the blocks; written to.
            fresh: [num_fresh] int64, nodes whose own first row is of this step; None: none.
        """
        assert self.left is not None, "only a logit shift needs it"
        first = hidden.view(len(slots), self.block_length, -1)[:, 0]
        if fresh is not None:
            self.left[slots[fresh]] = first[fresh]
        kept = self.left[slots]
        if fresh is not None:  # drafts may have one each, so that what is kept is another's
            kept[fresh] = first[fresh]
        first.copy_(kept)
        return hidden

    def reset(self, slots: Tensor, where: Tensor) -> None:
        """Begin a new block for those of the given slots that `where` marks; their policies remember nothing of it.

        Args:
            slots: [num_reqs] int64, without repetition.
            where: [num_reqs] bool.
        """
        if self._has_memory_np.any():
            anew = new_state(len(slots), self.block_length, self.device)
            self.remember(slots, select(where, anew, {name: its[slots] for name, its in self.memory.items()}))
        self.canvas[slots] = self.canvas[slots].masked_fill(where[:, None], self.mask_token_id)

    def filled(self, canvas: Tensor, missing: Tensor) -> Tensor:
        """Fill the ends of blocks that have `missing` [num_reqs] int64 positions fewer than their canvases."""
        return canvas.masked_fill(self._offsets >= self.block_length - missing[:, None], int(self.mask_token_id == 0))

    def _int(self, name: str) -> Tensor:
        return self._ints[_INTS.index(name)]

    def _float(self, name: str) -> Tensor:
        return self._floats[_FLOATS.index(name)]

    def _sampling_np(self, slots_np: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the temperatures of some slots, and whether each filters by top_k and by top_p."""
        temperature = self._floats_np[_FLOATS.index("temperature")][slots_np]
        has_top_k = self._ints_np[_INTS.index("top_k")][slots_np] > 0
        return temperature, has_top_k, self._floats_np[_FLOATS.index("top_p")][slots_np] < 1
