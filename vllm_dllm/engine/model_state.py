"""What happens before a forward: the step's plan, its rows in the input buffers, attention metadata.

vLLM's runner calls, for each step: `preprocess_state`, `prepare_attn`, `prepare_inputs`, the model, the sampler. Which
rows the forward has is ours to say (`engine.plan`): of the batch that vLLM made we take who takes part, where the
blocks begin and how many drafts each may have.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.tasks import GenerationTask
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.interface import ModelState
from vllm.v1.worker.gpu.states import RequestState

from vllm_dllm.arrays import IntArray, to_device
from vllm_dllm.attention.layout import empty_layout
from vllm_dllm.denoiser import Denoiser
from vllm_dllm.engine.configs import make_drafter, rules_of, served_family, settings_of, spiffy_of
from vllm_dllm.engine.head import choose_head
from vllm_dllm.engine.natives import check_hook
from vllm_dllm.engine.pins import write_pinned_rows
from vllm_dllm.engine.plan import StepPlan, plan_step
from vllm_dllm.engine.report import StepOrder
from vllm_dllm.engine.request import resolve_params
from vllm_dllm.engine.sampler import DllmSampler
from vllm_dllm.engine.step import Step, rows_to_device
from vllm_dllm.engine.step_attention import StepAttention
from vllm_dllm.engine.structured import answer_of
from vllm_dllm.state.canvas import Blocks, CanvasState
from vllm_dllm.state.delayed import DelayedRows
from vllm_dllm.state.draws import choose_draws
from vllm_dllm.state.kv import KvStep
from vllm_dllm.state.settle import Emission, Ledger, choose_settle
from vllm_dllm.state.step_rows import RowInputs, Sequences, choose_rows
from vllm_dllm.state.windows import make_schedule
from vllm_dllm.unmask.logprobs import LogprobHead
from vllm_dllm.unmask.walk import choose_walk

if TYPE_CHECKING:
    from vllm_dllm.models.transformer import MaskedDiffusionLM


class DllmModelState(ModelState):
    """The runner's view of block diffusion."""

    # A denoising step schedules the block's rows as vLLM's "draft tokens" and samples nothing besides.
    num_new_sampled_tokens_per_step = 0

    def __init__(
        self, vllm_config: VllmConfig, model: "MaskedDiffusionLM", encoder_cache: None, device: torch.device
    ) -> None:
        check_hook(vllm_config)
        super().__init__(vllm_config, model, encoder_cache, device)
        self.settings, self._family = settings_of(vllm_config), served_family(self.model_config)
        self.block_length = self.settings.block_length
        mask_token_id = self.model_config.hf_config.mask_token_id
        spiffy = spiffy_of(vllm_config)
        sizes, rules = (self.max_num_reqs, self.block_length), rules_of(vllm_config)
        vocab_size, files = self.model_config.get_vocab_size(), self.settings.files
        self.state = CanvasState(*sizes, mask_token_id, device, rules, self._left_rows(), vocab_size, files)
        drafter = make_drafter(vllm_config)
        self.denoiser = Denoiser(
            self.state,
            drafter,
            choose_head(model, vocab_size, self.never_chosen, device),
            choose_walk(device),
            choose_settle(device),
            choose_draws(device),
            LogprobHead(model.head_logits, self.model_config.get_vocab_size(), self.never_chosen),
        )
        self._fill_rows = DelayedRows.around(choose_rows(device), self.state, self.settings.kv_policy)
        self.kv_schedule = make_schedule(self.settings, **self._family.kv_facts)
        # Decides where the scheduler does not: ahead of reports, and while vLLM warms up, without an order.
        self.order: StepOrder | None = None
        self._max_drafts = 0 if spiffy is None else spiffy.max_nodes
        self._is_async = bool(vllm_config.scheduler_config.async_scheduling)
        self._look_ahead_from = None if drafter is None else drafter.look_ahead_from
        self._step: Step | None = None
        self._attention: StepAttention | None = None
        self._req_states: RequestState | None = None

    @property
    def never_chosen(self) -> int | None:
        """The token that no row chooses; None for none."""
        mask_token_id: int = self.model_config.hf_config.mask_token_id
        return mask_token_id

    def decide(self, step: Step, hidden: Tensor) -> Emission:
        """Decide a step; returns what it comes to.

        Args:
            step: that was begun last.
            hidden: [num_rows, hidden_size], its rows for the LM head.
        """
        fresh, twin_of = (None, None) if step.special is None else (step.special.fresh, step.special.twin_of)
        done = self.denoiser.advance(step.blocks, step.nodes, hidden, fresh, twin_of)
        if step.may_be_void:
            done = self.denoiser.void(step.blocks, done, self.is_void(step))
        return self.denoiser.settle(step.blocks, step.nodes, done, step.ledger)

    def shown(self, slots: Tensor) -> Tensor:
        """Return the canvases of slots as they are reported, [num_slots, block_length] int64: -1 for masked."""
        canvas = self.state.canvas[slots]
        return canvas.masked_fill(canvas == self.state.mask_token_id, -1)

    def get_supported_generation_tasks(self) -> tuple[GenerationTask, ...]:
        """Return the tasks the model serves."""
        return ("generate",)

    def custom_sampler(self, sampler: Any) -> tuple[Any, Any]:
        """Replace the sampler; there is no rejection sampler."""
        self._req_states = sampler.req_states
        self.state.edits.history = self._all_token_ids
        return DllmSampler(self), None

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig, block_tables: BlockTables) -> None:
        """Get attention ready for the cache."""
        self._attention = StepAttention(
            self.vllm_config, kv_cache_config, self.block_length, self.device, stores=self.settings.is_block_causal
        )

    @property
    def attention(self) -> StepAttention:
        """What makes the layers' metadata."""
        assert self._attention is not None, "a forward with metadata comes after initialize_kv_cache"
        return self._attention

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        """Take a request into a slot, a preempted one as if it were new: its finished blocks are now prompt."""
        assert new_req_data.sampling_params is not None, "check_admission refuses requests without"
        params = resolve_params(
            new_req_data.sampling_params,
            request_id=new_req_data.req_id,
            prompt_len=new_req_data.prompt_len,
            settings=self.settings,
            rules=self.state.rules,
            max_model_len=self.max_model_len,
        )
        known = new_req_data.prefill_token_ids or new_req_data.prompt_token_ids or []
        block_start = int(self.kv_schedule.block_start(np.array([len(known)]))[0])
        answer = answer_of(new_req_data.sampling_params, params, known, block_start, self.block_length)
        if len(known) <= params.prompt_len:  # it is new, even where another one had its id
            self.state.apart.forget([params.request_id])
        self.state.add_request(req_index, params, answer, block_start)
        self.kv_schedule.add(req_index, new_req_data.num_computed_tokens, params.prompt_len, params.pins)

    def apply_staged_writes(self) -> None:
        """Copy new requests' parameters to the device."""
        self.state.apply_staged_writes()

    def preprocess_state(
        self,
        input_batch: InputBatch,
        block_tables: tuple[Tensor, ...],
        kv_cache_config: KVCacheConfig,
        num_computed_tokens: Tensor,
    ) -> None:
        """Plan the step, and put its rows where the prompt tokens of the batch would be."""
        step = self._begin_step(input_batch, num_computed_tokens)
        num_rows = step.plan.num_rows
        if num_rows > input_batch.num_tokens:
            raise RuntimeError(
                f"a step has {num_rows} rows, but the scheduler counted {input_batch.num_tokens}: the two disagree on "
                f"what {input_batch.req_ids} store"
            )
        input_batch.num_scheduled_tokens = step.plan.rows_of_requests  # whose adapters each row takes
        input_batch.logits_indices = step.head_rows(logit_shift=self._family.logit_shift)
        pages = block_tables[0] if step.plan.stores.any() else None
        rows = None if step.special is None else step.special.rows
        known = Sequences(self._all_token_ids, pages, self.attention.page_size)
        into = RowInputs(input_batch.input_ids[:num_rows], input_batch.positions[:num_rows])
        store = self._fill_rows(step.nodes, step.blocks, rows, known, into, self.state.mask_token_id)
        write_pinned_rows(input_batch.input_ids, step.plan, self.state.pins, step.blocks.slots_np)
        self._step = replace(step, store=store)

    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[Tensor, ...],
        slot_mappings: Tensor,
        attn_groups: list[list[Any]],
        kv_cache_config: KVCacheConfig,
        for_capture: bool = False,
        ubatch_idx: int = 0,
    ) -> dict[str, Any]:
        """Lay the step out for every layer: who sees whom, and where K/V are stored.

        A captured graph finds the layout in persistent tensors, padded to the captured number of rows. vLLM captures
        with `for_capture` and replays with FULL. The rows of any other dummy batch see each other.
        """
        step = self.step_of(input_batch)
        is_graph = for_capture or cudagraph_mode == CUDAGraphMode.FULL
        if step is None and not is_graph:  # a dummy batch, of any number of rows
            return self.attention.lone(input_batch.num_tokens_after_padding)
        if step is None:
            host, page_table, store = empty_layout(), block_tables[0][:0], None
        else:
            host, page_table = step.plan.layout(), block_tables[0][: step.plan.num_reqs]
            store = step.store
        if not is_graph:
            return self.attention.eager(host, page_table, store)
        if step is not None and step.plan.is_long:
            raise RuntimeError("a captured graph was chosen for a step of segments that are no blocks")
        return self.attention.graph(host, page_table, input_batch.num_tokens_after_padding, store)

    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, Any]:
        """Pass the plan's rows alone to an eagerly run model, and all rows of a dummy batch."""
        step = self.step_of(input_batch)
        if step is None:
            return {}
        rows = slice(step.plan.num_rows)
        return {"input_ids": input_batch.input_ids[rows], "positions": input_batch.positions[rows]}

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        """Return nothing: a dummy batch's own buffers serve."""
        return {}

    def prepare_inputs_embeds(
        self, scheduled_encoder_inputs: dict[str, list[int]], input_batch: InputBatch, req_states: RequestState
    ) -> None:
        """Return None: the model embeds token ids itself."""
        return

    def step_of(self, batch: InputBatch) -> Step | None:
        """Return the step of a real batch; None for a dummy one, which `preprocess_state` does not see."""
        return self._step if self._step is not None and self._step.batch is batch else None

    def is_void(self, step: Step) -> Tensor:
        """Tell of whom the block had ended when a step began that is not of the next one; [num_reqs] bool."""
        num_computed: Tensor = self._request_states.num_computed_tokens.gpu
        return num_computed[step.blocks.slots] > step.ledger.num_known

    def _left_rows(self) -> Tensor | None:
        if not self._family.logit_shift or self._family.is_block_causal:
            return None
        shape = (self.max_num_reqs, self.model_config.get_hidden_size())
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def _begin_step(self, batch: InputBatch, num_computed_tokens: Tensor) -> Step:
        """Plan the step of the requests that have a block to decide, the first of the batch, and make their canvases.

        Where their blocks begin is the scheduler's knowledge, so nothing waits for the device; unless it leaves to us
        what the step stores, since it does not know what the step before came to.
        """
        counted = batch.num_draft_tokens_per_req
        num_reqs = 0 if counted is None else int((counted > 0).sum())
        counted_np = np.zeros(0, dtype=np.int64) if counted is None else counted[:num_reqs].astype(np.int64)
        slots, slots_np = batch.idx_mapping[:num_reqs], batch.idx_mapping_np[:num_reqs]
        kv = None if self.order is None else self.order.kv_of(batch.req_ids[:num_reqs])
        if kv is None:
            kv = self._decide_kv(batch, num_computed_tokens, num_reqs)
        block_start_np = self.kv_schedule.block_start(kv.num_known)
        num_known, start, num_counted = to_device(np.stack([kv.num_known, block_start_np, counted_np]), self.device)
        blocks = Blocks(slots, slots_np, start)
        seq_len_np = self.state.seq_end_np(slots_np, block_start_np)
        plan = self._plan(batch, kv, block_start_np, seq_len_np, counted_np)
        if kv.is_new.any():
            self._begin_rows(blocks, num_known, to_device(np.flatnonzero(kv.is_new), self.device))
        self.state.pins.begin(self.state.canvas, slots_np, block_start_np)
        missing = self._cut(blocks, block_start_np, seq_len_np) if kv.is_short.any() else None
        special = rows_to_device(plan, self.device, logit_shift=self._family.logit_shift)
        nodes = self.denoiser.nodes(blocks, plan.max_drafts, looks_ahead=plan.has_look_ahead)
        if special is not None:
            nodes = nodes.only(special.node, special.place)
        planned = None if special is None else special.planned
        ledger = Ledger(batch.num_reqs, num_known, num_counted, planned, missing=missing)
        if kv.stores_alone.any():
            ledger = replace(ledger, begun=to_device(kv.stores_alone.astype(np.int64), self.device))
        may_be_void = self.order is not None and self.order.may_be_void
        return Step(batch, plan, blocks, ledger, special, nodes, may_be_void=may_be_void)

    def _decide_kv(self, batch: InputBatch, num_computed_tokens: Tensor, num_reqs: int) -> KvStep:
        """Decide what a step stores of the first requests of a batch; with async scheduling by what the device has."""
        slots, slots_np = batch.idx_mapping[:num_reqs], batch.idx_mapping_np[:num_reqs]
        known_np = num_computed_tokens[slots].cpu().numpy() if self._is_async else batch.num_computed_tokens_np
        # A prompt is known, though its step is the one that vLLM counts it in.
        known_np = np.maximum(known_np[:num_reqs], batch.prefill_len_np[:num_reqs]).astype(np.int64)
        kv = self.kv_schedule.step(slots_np.tolist(), known_np, self.state.seq_end_np(slots_np, known_np))
        for slot, start in zip(slots_np.tolist(), self.kv_schedule.block_start(known_np).tolist(), strict=True):
            self.kv_schedule.note(slot, start)
        return kv

    def _plan(
        self, batch: InputBatch, kv: KvStep, block_start: IntArray, seq_len: IntArray, counted: IntArray
    ) -> StepPlan:
        """Plan a step of the first requests of a batch, of which vLLM counts so many tokens."""
        return plan_step(
            kv,
            block_start=block_start,
            seq_len=seq_len,
            num_drafts=self._num_drafts(batch, counted),
            block_length=self.block_length,
            kv_policy=self.settings.kv_policy,
            look_ahead_from=self._look_ahead_from,
            prompt_len=self.state.guidance.prompts(batch.idx_mapping_np[: len(counted)]),
            is_next_open=self.state.pins.is_next_open(batch.idx_mapping_np[: len(block_start)], block_start),
        )

    def _cut(self, blocks: Blocks, block_start: IntArray, seq_len: IntArray) -> Tensor:
        """Cut blocks that end with their rows; returns how many positions each has fewer, [num_reqs] int64."""
        missing = to_device((block_start + self.block_length - seq_len).clip(0), self.device)
        self.state.canvas[blocks.slots] = self.state.filled(self.state.canvas[blocks.slots], missing)
        return missing

    def _num_drafts(self, batch: InputBatch, counted: IntArray) -> IntArray:
        """Read how many drafts each request may have from what vLLM counts: its block, and one more for each.

        Raises: RuntimeError where vLLM cut a block.
        """
        num_drafts = counted - self.block_length
        if (num_drafts < 0).any():
            raise RuntimeError(
                f"vLLM scheduled {counted.tolist()} tokens of {batch.req_ids}, which need {self.block_length} each; "
                "the token budget or max_model_len was changed behind the configuration"
            )
        return num_drafts.clip(max=self._max_drafts)

    def _begin_rows(self, blocks: Blocks, num_known: Tensor, index: Tensor) -> None:
        """Begin the first blocks of some requests: masked, but for the end of a prompt that lies in one."""
        slots = blocks.slots[index]
        self.denoiser.begin_blocks(slots, torch.ones_like(slots, dtype=torch.bool))
        if not self.settings.is_block_causal:
            return
        positions = self.state.positions(blocks)[index]
        last = self._all_token_ids.shape[1] - 1
        known = self._all_token_ids[slots[:, None], positions.clamp(max=last)].long()
        is_known = positions < num_known[index, None]
        self.state.canvas[slots] = torch.where(is_known, known, self.state.canvas[slots])

    @property
    def _request_states(self) -> RequestState:
        assert self._req_states is not None, "custom_sampler ran when the model was loaded"
        return self._req_states

    @property
    def _all_token_ids(self) -> Tensor:
        token_ids: Tensor = self._request_states.all_token_ids.gpu
        return token_ids
