"""The table of what vLLM's Triton kernels rely on is of these kernels, and finds what none of them could take."""

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.e2e.triton_arguments import POINTERS, faults
from vllm_dllm.engine.cpu.binding import REPLACEMENTS, kernel_arg_names

LATER = {"draft_tokens_ptr", "draft_tokens_out_ptr"}
"""Arguments of `post_update` that vLLM 0.32 does not have."""


def test_the_table_has_every_pointer_of_the_installed_kernels() -> None:
    for name, impl in REPLACEMENTS.items():
        module, kernel = name.rsplit(".", 1)
        names = kernel_arg_names(getattr(importlib.import_module(module), kernel))
        pointers = {name for name in names if name.endswith("_ptr")}
        table = set(POINTERS[impl.__name__])
        assert table - pointers <= LATER
        assert pointers <= table


def ints(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def update() -> dict[str, Any]:
    """A launch of two requests, one of which emits a block of 4."""
    return {
        "idx_mapping_ptr": ints(2, 0, dtype=torch.int64),
        "num_computed_tokens_ptr": ints(8, 0, 5),
        "last_sampled_tokens_ptr": torch.zeros(3, 1, dtype=torch.int64),
        "output_bin_counts_ptr": None,
        "output_bin_counts_stride": 0,
        "sampled_tokens_ptr": torch.zeros(2, 4, dtype=torch.int32),
        "sampled_tokens_stride": 4,
        "num_sampled_ptr": ints(4, 0),
        "num_rejected_ptr": ints(3, 7),
        "query_start_loc_ptr": ints(0, 7, 14, 14),
        "all_token_ids_ptr": torch.zeros(3, 16, dtype=torch.int32),
        "all_token_ids_stride": 16,
        "total_len_ptr": ints(8, 0, 5),
    }


def combine() -> dict[str, Any]:
    """A launch of a request with a block of 4 and two drafts."""
    one = ints(7)
    return {
        "input_ids_ptr": torch.zeros(9, dtype=torch.int32),
        "idx_mapping_ptr": ints(0, dtype=torch.int64),
        "last_sampled_tokens_ptr": torch.zeros(1, 1, dtype=torch.int64),
        "query_start_loc_ptr": ints(0, 9),
        "seq_lens_ptr": one,
        "prefill_len_ptr": one,
        "draft_tokens_ptr": torch.zeros(1, 6, dtype=torch.int64),
        "draft_tokens_stride": 6,
        "cu_num_logits_ptr": ints(0, 6),
        "logits_indices_ptr": torch.zeros(6, dtype=torch.int64),
        "BLOCK_SIZE": 8,
        "NUM_NEW_SAMPLED_TOKENS": 0,
    }


LAUNCHES: dict[str, Callable[[], dict[str, Any]]] = {
    "post_update": update,
    "combine_sampled_and_draft_tokens": combine,
}


@pytest.mark.parametrize("kernel", LAUNCHES)
def test_a_right_launch_has_no_faults(kernel: str) -> None:
    assert faults(kernel, LAUNCHES[kernel]()) == []


@pytest.mark.parametrize(
    ("kernel", "name", "value", "fault"),
    [
        ("post_update", "num_sampled_ptr", ints(4, 9, 0, 9)[::2], "num_sampled_ptr has strides (2,)"),
        ("post_update", "num_sampled_ptr", None, "num_sampled_ptr is None"),
        ("post_update", "num_sampled_ptr", ints(4, 0).bool(), "num_sampled_ptr is torch.bool"),
        ("post_update", "num_sampled_ptr", ints(4, 0).numpy(), "num_sampled_ptr is a ndarray"),
        ("post_update", "sampled_tokens_ptr", torch.zeros(4, 2).int().T, "sampled_tokens_ptr has strides (1, 2)"),
        ("post_update", "sampled_tokens_ptr", torch.zeros(2, 3).int(), "What is emitted is in its row"),
        ("post_update", "sampled_tokens_stride", np.int64(4), "sampled_tokens_stride is a int64"),
        ("post_update", "total_len_ptr", ints(8, 0, 13), "the sequence has room for it"),
        ("post_update", "num_rejected_ptr", ints(13, 7), "no request goes back before its beginning"),
        ("post_update", "another", ints(1), "another is a tensor that this table does not know"),
        ("post_update", "last_sampled_tokens_ptr", torch.zeros(3, 2).long(), "last_sampled_tokens_ptr is [3, 2]"),
        ("combine_sampled_and_draft_tokens", "BLOCK_SIZE", 4, "One tile has all rows of a request"),
        ("combine_sampled_and_draft_tokens", "draft_tokens_ptr", torch.zeros(1, 5).long(), "row of drafts"),
    ],
)
def test_a_launch_that_the_kernel_cannot_take_is_found(kernel: str, name: str, value: Any, fault: str) -> None:
    (found,) = faults(kernel, LAUNCHES[kernel]() | {name: value})
    assert fault in found
