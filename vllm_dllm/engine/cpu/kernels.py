"""The V2 runner's small Triton kernels as a few numpy operations each, for a CPU without Triton.

Each function stands for one kernel of `vllm/v1/worker/gpu` and keeps the kernel's own parameter names, because it is
bound to the launch by name (`binding.bind`); that is why they are many, end in `_ptr` and may exceed the usual
count. A `_ptr` is the tensor the launch passed, so strides and tile sizes are not taken. A parameter with a default
is one that only some vLLM versions have, or that must keep its default here.

All tensors live on the host. They hold a few values per request, where numpy's dispatch costs a third of torch's.

Request rows of a step are ragged: row r of a batch of `num_reqs` owns the packed tokens
`[query_start_loc[r], query_start_loc[r + 1])`. `idx_mapping[r]` is the slot of its request.
"""

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.signedinteger]


def ragged(starts: Ints | int, lens: Ints) -> Ints:
    """Concatenate the ranges `[start, start + len)` of all rows.

    Args:
        starts: [num_rows], or one start for all rows.
        lens: [num_rows], not negative.

    Returns: [sum(lens)] int64.
    """
    ends = lens.cumsum(dtype=np.int64)
    offsets: Ints = np.repeat(np.subtract(starts, ends - lens), lens)
    return np.add(offsets, np.arange(offsets.shape[0]), out=offsets)


def lens_of(cu_lens: Ints, num_lens: int) -> Ints:
    """Return the lengths `[num_lens]` behind the prefix sums `cu_lens` `[>= num_lens + 1]`."""
    return cu_lens[1 : num_lens + 1] - cu_lens[:num_lens]


def apply_write(
    *,
    output_ptr: Tensor,
    write_indices_ptr: Tensor,
    write_starts_ptr: Tensor,
    write_contents_ptr: Tensor,
    write_cu_lens_ptr: Tensor,
    MULTI_GROUP: bool,
) -> None:
    """Apply the staged writes of one `StagedWriteTensor`.

    Args:
        output_ptr: [num_slots] or [num_slots, seq_len], contiguous.
        write_indices_ptr: [num_writes] int32, slot of each write; no element is written twice.
        write_starts_ptr: [num_writes] int32, first column of each write.
        write_contents_ptr: [sum of lengths], the values of all writes.
        write_cu_lens_ptr: [num_writes] int32, end of each write in the contents.
        MULTI_GROUP: whether the outputs are addresses, one per KV-cache group; not supported.
    """
    if MULTI_GROUP:
        raise NotImplementedError(
            "The model has several KV-cache groups; the CPU backend without Triton supports one. "
            "Use a Triton with a CPU backend."
        )
    ends = write_cu_lens_ptr.numpy()
    lens = ends.copy()
    lens[1:] -= ends[:-1]
    firsts = write_indices_ptr.numpy() * np.int64(output_ptr.stride(0)) + write_starts_ptr.numpy()
    output_ptr.view(-1).numpy()[ragged(firsts, lens)] = write_contents_ptr.numpy()[: ends[-1]]


def expand_idx_mapping(
    *,
    idx_mapping_ptr: Tensor,
    expanded_idx_mapping_ptr: Tensor,
    expanded_local_pos_ptr: Tensor,
    cu_num_logits_ptr: Tensor,
) -> None:
    """Give each logits row its request's slot and its number within the request.

    Args:
        idx_mapping_ptr: [num_reqs] int64.
        expanded_idx_mapping_ptr: [num_logits] int64, written.
        expanded_local_pos_ptr: [num_logits] int32, written.
        cu_num_logits_ptr: [num_reqs + 1] int32.
    """
    idx_mapping = idx_mapping_ptr.numpy()
    lens = lens_of(cu_num_logits_ptr.numpy(), idx_mapping.shape[0])
    expanded_idx_mapping_ptr.numpy()[:] = np.repeat(idx_mapping, lens)
    expanded_local_pos_ptr.numpy()[:] = ragged(0, lens)


def prepare_prefill_inputs(
    *,
    input_ids_ptr: Tensor,
    next_prefill_tokens_ptr: Tensor,
    idx_mapping_ptr: Tensor,
    query_start_loc_ptr: Tensor,
    all_token_ids_ptr: Tensor,
    prefill_lens_ptr: Tensor,
    num_computed_tokens_ptr: Tensor,
) -> None:
    """Copy the scheduled prompt tokens of the prefilling requests, and the few that follow them.

    Args:
        input_ids_ptr: [max_num_tokens] int32, written at the rows of prefilling requests.
        next_prefill_tokens_ptr: [num_lookahead, num_slots] int32, written at their slots; 0 past the prompt.
        idx_mapping_ptr: [num_reqs] int64.
        query_start_loc_ptr: [>= num_reqs + 1] int32.
        all_token_ids_ptr: [num_slots, max_model_len] int32.
        prefill_lens_ptr: [num_slots] int32.
        num_computed_tokens_ptr: [num_slots] int32.
    """
    idx_mapping, cu_lens = idx_mapping_ptr.numpy(), query_start_loc_ptr.numpy()
    is_prefilling = num_computed_tokens_ptr.numpy()[idx_mapping] < prefill_lens_ptr.numpy()[idx_mapping]
    slots = idx_mapping[is_prefilling]
    lens = lens_of(cu_lens, idx_mapping.shape[0])[is_prefilling]
    starts = cu_lens[: idx_mapping.shape[0]][is_prefilling]
    computed = num_computed_tokens_ptr.numpy()[slots]
    all_token_ids = all_token_ids_ptr.numpy()

    tokens = all_token_ids[np.repeat(slots, lens), ragged(computed, lens)]
    input_ids_ptr.numpy()[ragged(starts, lens)] = tokens

    next_tokens = next_prefill_tokens_ptr.numpy()
    positions = (computed + lens) + np.arange(next_tokens.shape[0])[:, None]
    is_in_prompt = positions < prefill_lens_ptr.numpy()[slots]
    next_tokens[:, slots] = all_token_ids[slots, positions * is_in_prompt] * is_in_prompt


def prepare_pos_seq_lens(
    *,
    pos_ptr: Tensor,
    seq_lens_ptr: Tensor,
    idx_mapping_ptr: Tensor,
    query_start_loc_ptr: Tensor,
    num_computed_tokens_ptr: Tensor,
) -> None:
    """Set the position of each scheduled token and the sequence length of each request.

    Args:
        pos_ptr: [max_num_tokens] int64, written at the scheduled tokens.
        seq_lens_ptr: [max_num_reqs] int32, written; 0 for rows without a request.
        idx_mapping_ptr: [num_reqs] int64.
        query_start_loc_ptr: [>= num_reqs + 1] int32.
        num_computed_tokens_ptr: [num_slots] int32.
    """
    idx_mapping, cu_lens = idx_mapping_ptr.numpy(), query_start_loc_ptr.numpy()
    num_reqs = idx_mapping.shape[0]
    lens = lens_of(cu_lens, num_reqs)
    computed = num_computed_tokens_ptr.numpy()[idx_mapping]
    seq_lens = seq_lens_ptr.numpy()
    seq_lens[:num_reqs] = computed + lens
    seq_lens[num_reqs:] = 0
    pos_ptr.numpy()[: cu_lens[num_reqs]] = ragged(computed, lens)


def combine_sampled_and_draft_tokens(
    *,
    input_ids_ptr: Tensor,
    idx_mapping_ptr: Tensor,
    last_sampled_tokens_ptr: Tensor,
    query_start_loc_ptr: Tensor,
    seq_lens_ptr: Tensor,
    prefill_len_ptr: Tensor,
    draft_tokens_ptr: Tensor,
    cu_num_logits_ptr: Tensor,
    logits_indices_ptr: Tensor,
    NUM_NEW_SAMPLED_TOKENS: int,
) -> None:
    """List the rows that need logits, the last ones of each request, and fill in their token ids.

    Args:
        input_ids_ptr: [max_num_tokens] int32, written where a request is past its prompt.
        idx_mapping_ptr: [num_reqs] int64.
        last_sampled_tokens_ptr: [num_slots, 1] int64, the token before the drafts.
        query_start_loc_ptr: [>= num_reqs + 1] int32.
        seq_lens_ptr: [>= num_reqs] int32.
        prefill_len_ptr: [num_slots] int32.
        draft_tokens_ptr: [num_slots, num_draft_tokens] int64.
        cu_num_logits_ptr: [num_reqs + 1] int32.
        logits_indices_ptr: [num_logits] int64, written.
        NUM_NEW_SAMPLED_TOKENS: 1 where the rows begin with a sampled token, 0 for diffusion.
    """
    slots = idx_mapping_ptr.numpy()
    num_reqs = slots.shape[0]
    lens = lens_of(cu_num_logits_ptr.numpy(), num_reqs)
    firsts = query_start_loc_ptr.numpy()[1 : num_reqs + 1] - lens
    logits_indices_ptr.numpy()[:] = ragged(firsts, lens)

    seq_lens, prefill_lens = seq_lens_ptr.numpy()[:num_reqs], prefill_len_ptr.numpy()[slots]
    is_decoding = seq_lens > prefill_lens
    input_ids = input_ids_ptr.numpy()
    if NUM_NEW_SAMPLED_TOKENS:
        is_generated = is_decoding & (seq_lens - lens >= prefill_lens)
        input_ids[firsts[is_generated]] = last_sampled_tokens_ptr.numpy()[slots[is_generated], 0]

    num_drafts = (lens - NUM_NEW_SAMPLED_TOKENS).clip(min=0) * is_decoding
    first_drafts = firsts + NUM_NEW_SAMPLED_TOKENS
    drafts = draft_tokens_ptr.numpy()[np.repeat(slots, num_drafts), ragged(0, num_drafts)]
    input_ids[ragged(first_drafts, num_drafts)] = drafts


def post_update(
    *,
    idx_mapping_ptr: Tensor,
    num_computed_tokens_ptr: Tensor,
    last_sampled_tokens_ptr: Tensor,
    output_bin_counts_ptr: Tensor | None,
    sampled_tokens_ptr: Tensor,
    num_sampled_ptr: Tensor,
    num_rejected_ptr: Tensor,
    query_start_loc_ptr: Tensor | None,
    all_token_ids_ptr: Tensor,
    total_len_ptr: Tensor,
    draft_tokens_ptr: Tensor | None = None,
) -> None:
    """Record what a step emitted: tokens, lengths and the count of computed tokens.

    Args:
        idx_mapping_ptr: [num_reqs] int64; a negative entry skips the request.
        num_computed_tokens_ptr: [num_slots] int32, grows by scheduled minus rejected tokens.
        last_sampled_tokens_ptr: [num_slots, 1] int64, set where a request emits.
        output_bin_counts_ptr: [num_slots, vocab_size] int32, counts emitted tokens; or None.
        sampled_tokens_ptr: [num_reqs, max_emitted], the first `num_sampled` of each row count.
        num_sampled_ptr: [num_reqs] int32.
        num_rejected_ptr: [num_reqs] int32.
        query_start_loc_ptr: [>= num_reqs + 1] int32; None schedules no tokens.
        all_token_ids_ptr: [num_slots, max_model_len] int32, appended to.
        total_len_ptr: [num_slots] int32, grows by `num_sampled`.
        draft_tokens_ptr: drafts received by an earlier pipeline stage (vLLM 0.33); not supported.
    """
    if draft_tokens_ptr is not None:
        raise NotImplementedError("Pipeline parallelism is not supported on a CPU without Triton.")
    rows = np.flatnonzero(idx_mapping_ptr.numpy() >= 0)
    slots = idx_mapping_ptr.numpy()[rows]
    computed = num_computed_tokens_ptr.numpy()
    computed[slots] -= num_rejected_ptr.numpy()[rows]
    if query_start_loc_ptr is not None:
        computed[slots] += lens_of(query_start_loc_ptr.numpy(), idx_mapping_ptr.shape[0])[rows]

    lens = num_sampled_ptr.numpy()[rows]
    emits = lens > 0
    if not emits.any():  # most steps of a diffusion model
        return
    rows, slots, lens = rows[emits], slots[emits], lens[emits]
    sampled, total_lens = sampled_tokens_ptr.numpy(), total_len_ptr.numpy()
    tokens = sampled[np.repeat(rows, lens), ragged(0, lens)]
    token_slots = np.repeat(slots, lens)
    all_token_ids_ptr.numpy()[token_slots, ragged(total_lens[slots], lens)] = tokens
    last_sampled_tokens_ptr.numpy()[slots, 0] = sampled[rows, lens - 1]
    total_lens[slots] += lens
    if output_bin_counts_ptr is not None:  # a token may occur twice in a row: unbuffered addition
        np.add.at(output_bin_counts_ptr.numpy(), (token_slots, tokens), 1)
