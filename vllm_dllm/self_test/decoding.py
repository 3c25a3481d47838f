"""The native ops of decoding against their torch twins: rows of logits at a model's vocabulary, and some whole steps.

In the steps the twins decode. Each native op gets what its twin got, so that one that is wrong misleads no other.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from vllm_dllm import noise, ops
from vllm_dllm.denoiser import Denoiser
from vllm_dllm.draft.calibrated import GraphDrafter
from vllm_dllm.draft.compile import CompiledGraph
from vllm_dllm.draft.graph import DraftGraph
from vllm_dllm.draft.native import native_nodes, torch_nodes
from vllm_dllm.draft.token_weights import TokenWeights
from vllm_dllm.errors import KernelUnavailable
from vllm_dllm.ops.vocab_stats import PartialStats, RowSampling, vocab_stats
from vllm_dllm.self_test.check import Check, relative_error, share_unequal
from vllm_dllm.state.canvas import Blocks, CanvasState
from vllm_dllm.state.drafts import DraftState
from vllm_dllm.state.draws import native_draws, torch_draws
from vllm_dllm.state.request_params import RequestParams
from vllm_dllm.state.settle import Emission, Ledger, native_settle, settle
from vllm_dllm.state.step_rows import RowInputs, RowPlan, Sequences, native_rows, torch_rows
from vllm_dllm.unmask.head import LogitsHead
from vllm_dllm.unmask.memory import PolicyState
from vllm_dllm.unmask.policy import POLICIES, POLICY_IDS, PolicyParams
from vllm_dllm.unmask.schedule import UnmaskRules, count_table, reveal_times
from vllm_dllm.unmask.stats import torch_stats
from vllm_dllm.unmask.walk import NO_STATE, Nodes, Trajectory, native_walk, walk

OPS = ("vocab_stats", "propose_nodes", "step_rows", "row_draws", "decide_walk", "settle_step")

ALLOWED_SUMS = 1e-4
"""Relative error of sums of a row's float32 terms."""
ALLOWED_STEP = 1e-9
"""Of all else: ids and places are equal, and float64 numbers are so to rounding."""

VOCAB, MASK = 256, 255
"""Of the steps; rows of logits have a check of their own."""
NUM_STEPS, NUM_DRAFTS = 8, 5
MAX_LEN = 512
_LIKELIEST_LAST = TokenWeights(-1.0, -0.5, (-3.0, 1.0, -0.5, 0.5))
"""Token weights that turn the order around, so that each of them decides."""


@dataclass(frozen=True, slots=True)
class DecodingShape:
    """What of a server decides how its steps are decided."""

    vocab_size: int
    block_length: int
    dtype: torch.dtype  # of the model; logits are of it or float32
    rules: UnmaskRules = UnmaskRules()  # noqa: RUF009 - a frozen value


def built_ops(device: torch.device) -> list[str]:
    """Return those of these ops that are built for a device; where one is not, its twin serves."""
    return [op for op in OPS if _is_built(op, device)]


def check_decoding(shape: DecodingShape, device: torch.device) -> Iterator[Check]:
    """Compare each op that is built for the device."""
    built = built_ops(device)
    if "vocab_stats" in built:
        yield from check_rows(shape, device)
    errors = _Compared(built).run(shape, device)
    case = f"{NUM_STEPS} steps of {len(POLICIES)} policies, blocks of {shape.block_length}"
    for op, error in errors.items():
        yield Check(op, case, error, ALLOWED_STEP)


def check_rows(shape: DecodingShape, device: torch.device) -> Iterator[Check]:
    """Compare `vocab_stats` on rows of logits, half of them drawn within filters; on a CPU also on rows and weights."""
    num_rows = 2 * min(shape.block_length, 32)
    generator = torch.Generator(device).manual_seed(2)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    logits, kind = 3 * draw(num_rows, shape.vocab_size), f"{num_rows} rows of {shape.vocab_size}"
    for dtype in dict.fromkeys((shape.dtype, torch.float32)):
        its = logits.to(dtype)
        yield from _check_stats(its, None, its, f"{kind} {_name(dtype)} logits")
    if device.type == "cpu":
        rows, weight = draw(num_rows, 64).to(shape.dtype), draw(shape.vocab_size, 64).to(shape.dtype)
        logits = rows.float() @ weight.float().T
        yield from _check_stats(rows, weight, logits, f"{kind} logits from a {_name(shape.dtype)} weight")


def _check_stats(rows: Tensor, weight: Tensor | None, logits: Tensor, kind: str) -> Iterator[Check]:
    """Compare `vocab_stats` of rows and a weight with what torch makes of the logits."""
    excluded, sampling = logits.shape[1] - 1, _row_sampling(len(logits), logits.device)
    expected = torch_stats(logits.clone(), excluded_ids=[excluded], num_candidates=8, sampling=sampling)
    ordered = logits[:, :excluded].float().sort(dim=1, descending=True, stable=True)  # of equal ones the lowest first
    top_ids = ordered.indices[:, :8]
    token_ids = torch.where(sampling.temperature > 0, expected.token_ids, top_ids[:, 0])
    found = vocab_stats(rows, weight, excluded_ids=[excluded], num_candidates=8, sampling=sampling)
    ids = max(share_unequal(found.top_ids, top_ids), share_unequal(found.token_ids, token_ids))
    yield Check("vocab_stats", f"ids of {kind}", ids, 0.0)
    names = ("top_logits", "rest", "weighted", "token_logits", "scores", "sampled_rest", "sampled_weighted")
    sums = _largest(relative_error(getattr(found, name), getattr(expected, name)) for name in names)
    yield Check("vocab_stats", f"sums of {kind}", sums, ALLOWED_SUMS)


def _row_sampling(num_rows: int, device: torch.device) -> RowSampling:
    drawn = torch.arange(num_rows, device=device) >= num_rows // 2
    seed = torch.full((num_rows,), 5, device=device)
    return RowSampling(
        temperature=torch.where(drawn, 0.7, 0.0).double(),
        top_k=torch.where(drawn, 50, 0),
        top_p=torch.where(drawn, 0.9, 1.0).double(),
        keys=noise.stream_keys(seed, torch.arange(num_rows, device=device), seed),
        has_filter=True,
        wants_sampled=True,
    )


class _Compared:
    """Runs the twins of native ops beside them, hands on what the twins say, and keeps the largest error of each op."""

    def __init__(self, built: list[str]) -> None:
        self.errors: dict[str, float] = {}
        self._built = built

    def run(self, shape: DecodingShape, device: torch.device) -> dict[str, float]:
        """Decode some steps of a request of each policy, greedy and drawn; returns the errors."""
        state = _requests(shape, device)
        slots = torch.arange(len(POLICIES), device=device).flip(0)
        blocks = Blocks(slots, slots.cpu().numpy(), torch.full_like(slots, 64))
        graph = _graph(shape.block_length)
        drafter = GraphDrafter(graph, choose=lambda _device: self.propose)
        head = LogitsHead(lambda rows: rows.clone(), VOCAB, MASK, is_native=False)
        denoiser = Denoiser(state, drafter, head, self.walk, self.settle, self.draw)
        denoiser.begin_blocks(slots, torch.ones_like(slots, dtype=torch.bool))
        generator = torch.Generator(device).manual_seed(3)
        logits = torch.randn(len(slots), 1, shape.block_length, VOCAB, generator=generator, device=device)
        for number in range(NUM_STEPS):
            # The same rows for all canvases: so do drafts come true.
            looks_ahead = number % 2 == 1
            nodes = denoiser.nodes(blocks, min(number, NUM_DRAFTS, len(graph)), looks_ahead=looks_ahead)
            self.fill_rows(nodes, blocks)
            rows = (4 + number) * logits.expand(-1, nodes.canvas.shape[1], -1, -1)
            done = denoiser.advance(blocks, nodes, rows.reshape(-1, VOCAB))
            planned = torch.ones(3, len(slots), dtype=torch.int64, device=device) if looks_ahead else None
            ledger = Ledger(len(slots) + 1, blocks.start, torch.full_like(slots, shape.block_length), planned)
            denoiser.settle(blocks, nodes, done, ledger)
            blocks = replace(blocks, start=blocks.start + done.is_finished * shape.block_length)
        return self.errors

    def propose(
        self,
        graph: CompiledGraph,
        canvases: CanvasState,
        memory: DraftState,
        blocks: Blocks,
        num_drafts: int,
        looks_ahead: bool,
    ) -> Nodes:
        """Stand where a drafter asks for the canvases of a step."""
        call = (canvases, memory, blocks, num_drafts, looks_ahead)
        for tokens in (_LIKELIEST_LAST, None):
            made_for = replace(graph, tokens=tokens)
            expected = torch_nodes(made_for, *call)
            if "propose_nodes" not in self._built:
                continue
            found = native_nodes(made_for, *call)
            valid = expected.is_valid
            pairs = [(found.is_valid, valid), (found.depth, expected.depth)]
            # What others hold is open.
            pairs += [(getattr(found, name)[valid], getattr(expected, name)[valid]) for name in ("canvas", "is_masked")]
            if found.end is not None and expected.end is not None:
                is_ahead = valid[:, -1]
                pairs += [(found.end[is_ahead], expected.end[is_ahead])]
            self._note("propose_nodes", pairs)
        return expected

    def fill_rows(self, nodes: Nodes, blocks: Blocks) -> None:
        """Fill the rows of a plain step, and of one whose rows are of all kinds, with tokens and places of pages."""
        if "step_rows" not in self._built:
            return
        num_tokens, device = nodes.canvas.numel(), nodes.canvas.device
        num_sources = num_tokens + (0 if nodes.end is None else nodes.end.numel()) + 1
        row = torch.arange(-3, num_sources, device=device)
        plan = RowPlan((row + 3) % len(blocks.slots), row, (row + 3) % MAX_LEN, (row + 3) % 2)
        token_ids = torch.arange((len(POLICIES) + 1) * MAX_LEN, dtype=torch.int32, device=device).view(-1, MAX_LEN)
        pages = 1 + torch.arange(len(blocks.slots) * MAX_LEN // 16, dtype=torch.int32, device=device)
        known = Sequences(token_ids, pages.view(len(blocks.slots), -1), 16)
        for each, num_rows in ((None, num_tokens), (plan, len(row))):
            results = []
            for way in (native_rows, torch_rows):
                ids = torch.zeros(num_rows, dtype=torch.int32, device=device)
                positions = torch.zeros(num_rows, dtype=torch.int64, device=device)
                places = way(nodes, blocks, each, known, RowInputs(ids, positions), MASK)
                results.append([ids, positions, *([] if places is None else [places.page, places.offset])])
            self._note("step_rows", list(zip(*results, strict=True)))

    def draw(self, state: CanvasState, blocks: Blocks, nodes: Nodes) -> RowSampling:
        """Stand where draws are made ready."""
        expected = torch_draws(state, blocks, nodes)
        if "row_draws" in self._built:
            found = native_draws(state, blocks, nodes)
            names = ("temperature", "top_k", "top_p", "keys")
            self._note("row_draws", [(getattr(found, name), getattr(expected, name)) for name in names])
        return expected

    def walk(
        self,
        nodes: Nodes,
        stats: PartialStats,
        params: PolicyParams,
        mask_token_id: int,
        rules: UnmaskRules,
        state: PolicyState = NO_STATE,
    ) -> Trajectory:
        """Stand where canvases are decided."""
        expected = walk(nodes, stats, params, mask_token_id, rules, state)
        if "decide_walk" in self._built:
            found = native_walk(nodes, stats, params, mask_token_id, rules, state)
            names = [f.name for f in fields(Trajectory) if isinstance(getattr(expected, f.name), Tensor)]
            pairs = [(getattr(found, name), getattr(expected, name)) for name in names]
            pairs += [(found.state[name], its) for name, its in expected.state.items()]
            both = (found.candidates, expected.candidates)
            pairs += [(both[0].token_ids, both[1].token_ids), (both[0].log_probs, both[1].log_probs)]
            self._note("decide_walk", pairs)
        return expected

    def settle(
        self,
        state: CanvasState,
        drafts: DraftState | None,
        blocks: Blocks,
        nodes: Nodes,
        done: Trajectory,
        ledger: Ledger,
    ) -> Emission:
        """Stand where steps are settled."""
        stores = copy.deepcopy((state, drafts))
        expected = settle(state, drafts, blocks, nodes, done, ledger)
        if "settle_step" in self._built:
            contiguous = replace(done, canvas=done.canvas.contiguous(), next_canvas=done.next_canvas.contiguous())
            found = native_settle(*stores, blocks, nodes, contiguous, ledger)
            names = [f.name for f in fields(Emission) if isinstance(getattr(expected, f.name), Tensor)]
            pairs = [(getattr(found, name), getattr(expected, name)) for name in names]
            pairs += zip(_kept(*stores), _kept(state, drafts), strict=True)
            self._note("settle_step", pairs)
        return expected

    def _note(self, op: str, pairs: list[tuple[Tensor, Tensor]]) -> None:
        """Take note of how far results (found, expected) are from each other."""
        error = _largest(
            relative_error(*pair) if pair[1].is_floating_point() else share_unequal(*pair) for pair in pairs
        )
        self.errors[op] = _largest([error, self.errors.get(op, 0.0)])


def _kept(state: CanvasState, drafts: DraftState | None) -> list[Tensor]:
    assert drafts is not None, "the steps have drafts"
    return [state.canvas, *state.memory.values(), *drafts.tensors]


def _largest(errors: Iterator[float] | list[float]) -> float:
    """Return the largest error; NaN is larger than any."""
    return max(errors, key=lambda error: (error != error, error), default=0.0)


def _requests(shape: DecodingShape, device: torch.device) -> CanvasState:
    """Make the state of a request of each policy; every third one is drawn at a temperature."""
    block_length = shape.block_length
    state = CanvasState(len(POLICIES) + 1, block_length, MASK, device, shape.rules)
    steps = max(1, block_length // 2)
    for slot, name in enumerate(POLICIES):
        params = RequestParams(
            policy_id=POLICY_IDS[name],
            threshold=0.6,
            factor=1.0,
            entropy_bound=0.5,
            credit_alpha=0.7,
            credit_beta=0.8,
            credit_gamma=0.2,
            alg_temp=0.1 if name == "margin" else 0.0,
            counts=count_table(shape.rules, block_length, steps),
            times=reveal_times(block_length, steps),
            prompt_len=64,
            seq_len=64 + (2 + NUM_STEPS) * block_length,
            temperature=0.7 if slot % 3 == 1 else 0.0,
            top_k=20 if slot % 3 == 1 else 0,
            top_p=0.9 if slot % 3 == 1 else 1.0,
            seed=slot,
        )
        state.add_request(slot, params)
    state.apply_staged_writes()
    return state


def _graph(block_length: int) -> DraftGraph:
    """Return a graph of a chain, and of the second guesses of its first nodes."""
    chain = DraftGraph.chain(min(block_length, NUM_DRAFTS)).formulas
    others = [(*formula[:-1], (formula[-1][0], 1)) for formula in chain]
    return DraftGraph((*chain, *others)).parents_first()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_built(op: str, device: torch.device) -> bool:
    try:
        ops.require(op, device.type)
    except KernelUnavailable:
        return False
    return True
