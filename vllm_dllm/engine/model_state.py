"""What happens before a forward: refreshes and prefills, canvases into the input buffers, attention metadata.

vLLM's runner calls, for each step: `preprocess_state`, `prepare_attn`, `prepare_inputs`, the model, the sampler. Its
batch begins with the requests that take a denoising step, `block_length` rows for each of their nodes; requests whose
prompt was just scheduled follow. The rows that vLLM schedules for a prompt are never computed: before the request's
first denoising step a side forward computes what the model needs, a bidirectional one the whole row with its masked
generation, a block-causal one the prompt's whole blocks.
"""

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import set_forward_context
from vllm.tasks import GenerationTask
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.interface import ModelState
from vllm.v1.worker.gpu.states import RequestState

from vllm_dllm.attention.layout import empty_layout, stored_rows, storing_layout
from vllm_dllm.denoiser import Denoiser, Drafting, Evaluated
from vllm_dllm.draft.compile import compile_graph
from vllm_dllm.draft.look_ahead import smallest_budget
from vllm_dllm.draft.native import choose_propose
from vllm_dllm.engine.attention import ForwardAttention
from vllm_dllm.engine.configs import rules_of, served_family, settings_of, spiffy_of
from vllm_dllm.engine.head import choose_head
from vllm_dllm.engine.request import resolve_params
from vllm_dllm.engine.sampler import DllmSampler
from vllm_dllm.engine.step import DenoiseStep, Group, split_groups
from vllm_dllm.engine.step_attention import StepAttention
from vllm_dllm.state.canvas import Blocks, CanvasState
from vllm_dllm.state.drafts import DraftState
from vllm_dllm.state.kv import IntArray, KvSchedule, StorePlan
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
        super().__init__(vllm_config, model, encoder_cache, device)
        self.settings = settings_of(vllm_config)
        self.block_length = self.settings.block_length
        mask_token_id = self.model_config.hf_config.mask_token_id
        spiffy = spiffy_of(vllm_config)
        self.state = CanvasState(
            self.max_num_reqs, self.block_length, mask_token_id, device, rules_of(vllm_config), self._edge()
        )
        drafting = None
        if spiffy is not None:
            drafting = Drafting(compile_graph(spiffy.graph, device), DraftState(self.state), choose_propose(device))
        self.denoiser = Denoiser(
            self.state,
            drafting,
            choose_head(model, self.model_config.get_vocab_size(), mask_token_id, device),
            choose_walk(device),
        )
        self.kv_policy = KvSchedule(
            self.settings.kv_policy, self.settings.refresh_every, self.block_length, self.max_num_reqs
        )
        self._max_drafts = 0 if spiffy is None else spiffy.max_nodes
        self._is_async = bool(vllm_config.scheduler_config.async_scheduling)
        self._look_ahead_from = smallest_budget(self.settings, is_async=self._is_async)
        self._step: DenoiseStep | None = None
        self._attention: StepAttention | None = None
        self._req_states: RequestState | None = None

    def get_supported_generation_tasks(self) -> tuple[GenerationTask, ...]:
        """Return the tasks the model serves."""
        return ("generate",)

    def custom_sampler(self, sampler: Any) -> tuple[Any, Any]:
        """Replace the sampler; there is no rejection sampler."""
        self._req_states = sampler.req_states
        return DllmSampler(self), None

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig, block_tables: BlockTables) -> None:
        """Get attention ready for the cache."""
        self._attention = StepAttention(
            self.vllm_config, kv_cache_config, self.block_length, self.device, stores=self.kv_policy.is_causal
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
        self.state.add_request(req_index, params)
        self.kv_policy.add_request(req_index, new_req_data.num_computed_tokens)

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
        """Refresh what the step needs fresh, then put the canvases where the prompt tokens of the batch would be."""
        if self._step is not None:
            self.kv_policy.come_over(*self._step.came_over())
        step = self._denoise_step(input_batch, num_computed_tokens)
        self._step = step
        if step.num_reqs == 0:
            return
        self._store_before(step, block_tables[0])
        step.groups = list(self._groups(step))
        for group in step.groups:
            group.nodes = self.denoiser.nodes(group.blocks, group.num_drafts, looks_ahead=group.looks_ahead)
        input_batch.logits_indices = input_batch.logits_indices[: step.num_rows]
        if step.num_rows == 0:
            return
        rows = step.rows(block_tables[0], self.attention.page_size, self._all_token_ids)
        input_batch.input_ids[: step.num_rows] = rows.input_ids
        input_batch.positions[: step.num_rows] = rows.positions

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
        """Lay the step out for every layer: each canvas sees its request's row but the block, and itself in flight.

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
            host, page_table, store = step.layout(), step.page_table(block_tables[0]), step.store
        if is_graph:
            return self.attention.graph(host, page_table, input_batch.num_tokens_after_padding, store)
        return self.attention.eager(host, page_table, store)

    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, Any]:
        """Pass the denoising rows alone to an eagerly run model, and all rows of a dummy batch."""
        step = self.step_of(input_batch)
        if step is None:
            return {}
        rows = slice(step.num_rows)
        return {"input_ids": input_batch.input_ids[rows], "positions": input_batch.positions[rows]}

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        """Return nothing: a dummy batch's own buffers serve."""
        return {}

    def prepare_inputs_embeds(
        self, scheduled_encoder_inputs: dict[str, list[int]], input_batch: InputBatch, req_states: RequestState
    ) -> None:
        """Return None: the model embeds token ids itself."""
        return

    def step_of(self, batch: InputBatch) -> DenoiseStep | None:
        """Return the step of a real batch; None for a dummy one, which `preprocess_state` does not see."""
        return self._step if self._step is not None and self._step.batch is batch else None

    def _edge(self) -> Tensor | None:
        if not served_family(self.model_config).logit_shift:
            return None
        shape = (self.max_num_reqs, self.model_config.get_hidden_size())
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def _denoise_step(self, batch: InputBatch, num_computed_tokens: Tensor) -> DenoiseStep:
        """Find the requests that take a denoising step; the others of the batch begin with their prompt.

        Their number and where their blocks begin are the scheduler's knowledge, so nothing waits for the device; unless
        it schedules ahead, and does not know what the step before came to.
        """
        num_rows = batch.num_draft_tokens_per_req
        num_reqs = 0 if num_rows is None else int((num_rows > 0).sum())
        slots, slots_np = batch.idx_mapping[:num_reqs], batch.idx_mapping_np[:num_reqs]
        num_known = num_computed_tokens[slots].long()
        num_known_np = num_known.cpu().numpy() if self._is_async else batch.num_computed_tokens_np[:num_reqs]
        block_start_np = self.kv_policy.block_start(num_known_np.astype(np.int64))
        blocks = Blocks(slots, slots_np, self.kv_policy.block_start(num_known))
        none = torch.zeros(num_reqs, dtype=torch.int64, device=self.device)
        return DenoiseStep(
            batch=batch,
            blocks=blocks,
            num_known=num_known,
            block_start_np=block_start_np,
            visible_end_np=self.kv_policy.visible_end(block_start_np, self.state.row_len_np[slots_np]),
            commits_np=self.kv_policy.commits(slots_np, block_start_np),
            num_refreshes=none,
            num_unmasked=none.clone(),
            num_stored=none.clone(),
            is_finished_np=np.zeros(num_reqs, dtype=bool),
        )

    def _groups(self, step: DenoiseStep) -> Iterator[Group]:
        num_rows = step.batch.num_draft_tokens_per_req
        assert num_rows is not None, "a step has requests because they have rows"
        return split_groups(
            step.blocks,
            num_rows[: step.num_reqs],
            step.commits_np,
            step.is_finished_np,
            block_length=self.block_length,
            max_drafts=self._max_drafts,
            look_ahead_from=self._look_ahead_from,
        )

    def _store_before(self, step: DenoiseStep, page_table: Tensor) -> None:
        """Store the K/V that the step needs, in forwards of at most `max_num_tokens` rows each."""
        slots_np = step.blocks.slots_np
        plan = self.kv_policy.plan(slots_np, step.block_start_np, self.state.row_len_np[slots_np])
        if self.kv_policy.is_causal and len(plan.index):
            self._fill_tails(step, self._to_device(plan.index))
        plan = plan[plan.end > plan.begin]
        begin = 0
        while begin < len(plan.index):
            fits = np.searchsorted(np.cumsum((plan.end - plan.begin)[begin:]), self.max_num_tokens, side="right")
            end = begin + max(1, int(fits))
            self._refresh_forward(step, plan[begin:end], page_table)
            begin = end

    def _fill_tails(self, step: DenoiseStep, index: Tensor) -> None:
        """Put the prompt's end, where it lies in the first block of a request, into its canvas."""
        slots, positions = step.blocks.slots[index], self.state.positions(step.blocks)[index]
        is_known = positions < step.num_known[index, None]
        known = self._all_token_ids[slots[:, None], positions].long()
        self.state.canvas[slots] = torch.where(is_known, known, self.state.canvas[slots])

    def _refresh_forward(self, step: DenoiseStep, plan: StorePlan, page_table: Tensor) -> None:
        """Run the model over the packed rows of some requests and store their K/V; let it decide a step if it does."""
        index, begin, end = (self._to_device(array) for array in (plan.index, plan.begin, plan.end))
        own_len_np = plan.end - plan.begin
        blocks = Blocks(step.blocks.slots[index], step.blocks.slots_np[plan.index], step.blocks.start[index])
        rows = stored_rows(begin, end, int(own_len_np.sum()))
        pages = page_table[index]
        attention = self.attention.eager(
            storing_layout(plan.begin, plan.end, self.block_length if self.kv_policy.is_causal else None),
            pages,
            rows.stored_at(pages, self.attention.page_size),
        )
        input_ids = self._row_ids(blocks.slots[rows.request], rows.position, blocks.start[rows.request])
        hidden = self._forward(attention, input_ids, rows.position)
        step.num_stored[index] = end - begin
        if self.kv_policy.is_causal:
            return
        step.num_refreshes.index_fill_(0, index, 1)
        first_row = self._to_device(np.cumsum(own_len_np) - own_len_np) - begin
        if self.state.edge is not None:
            spans_edge = self._to_device(np.flatnonzero(plan.begin < step.block_start_np[plan.index]))
            edge_row = (first_row + blocks.start - 1)[spans_edge]
            self.state.edge[blocks.slots[spans_edge]] = hidden[edge_row]
        if self.kv_policy.decides_step:
            block_rows = (first_row[:, None] + self.state.positions(blocks)).flatten()
            (done,) = self.denoiser.advance([Evaluated(blocks, self.denoiser.nodes(blocks, 0), hidden[block_rows])])
            step.num_unmasked[index] = done.num_unmasked
            if self.device.type == "cpu":  # elsewhere the host would wait, and a captured step has its rows anyway
                step.is_finished_np[plan.index] = done.is_finished.numpy()

    @torch.inference_mode()
    def measure_cost(self, num_reqs: int, num_nodes: int) -> float:
        """Time a forward with its row statistics, on canvases that belong to nobody.

        Args:
            num_reqs: requests that take part.
            num_nodes: canvases of each.

        Returns: milliseconds, the better of two runs.
        """
        context_len = min(self.max_model_len - self.block_length, 512)
        attention = self.attention.example(num_reqs, num_nodes, context_len)
        num_rows = num_reqs * num_nodes * self.block_length
        ids = torch.full((num_rows,), self.state.mask_token_id, device=self.device)
        positions = torch.arange(num_rows, device=self.device) % self.block_length
        return min(self._time_forward(attention, ids, positions) for _ in range(2))

    def _time_forward(self, attention: dict[str, ForwardAttention], input_ids: Tensor, positions: Tensor) -> float:
        begin = time.perf_counter()
        self.denoiser.reduce(self._forward(attention, input_ids, positions), is_sampled=False)
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        return 1e3 * (time.perf_counter() - begin)

    def _forward(self, attention: dict[str, ForwardAttention], input_ids: Tensor, positions: Tensor) -> Tensor:
        """Run the model outside the runner's own forward; returns its hidden rows."""
        num_rows = len(input_ids)
        with set_forward_context(attention, self.vllm_config, num_tokens=num_rows, slot_mapping={}):
            hidden: Tensor = self.model(input_ids=input_ids, positions=positions)
        return hidden

    def _row_ids(self, slots: Tensor, positions: Tensor, block_start: Tensor) -> Tensor:
        """Return the tokens at the given positions: known ones, the canvas in the block, masks behind it.

        Args:
            slots, positions, block_start: [num_rows] int64.
        """
        known = self._all_token_ids[slots, positions].long()
        in_block = positions - block_start
        canvas = self.state.canvas[slots, in_block.clamp(0, self.block_length - 1)]
        ids = torch.where(in_block < 0, known, canvas)
        return ids.masked_fill_(in_block >= self.block_length, self.state.mask_token_id)

    @property
    def _all_token_ids(self) -> Tensor:
        assert self._req_states is not None, "custom_sampler ran when the model was loaded"
        token_ids: Tensor = self._req_states.all_token_ids.gpu
        return token_ids

    def _to_device(self, array: IntArray) -> Tensor:
        return async_tensor_h2d(array, device=self.device)
