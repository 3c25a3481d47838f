"""What vLLM's Triton kernels rely on of the tensors that a step gives them, and whether ours are so.

Triton compiles a kernel for the dtypes it is given and checks nothing else: neither strides nor sizes. On a CPU numpy
stands in for the kernels of `vllm/v1/worker/gpu`, and takes any strides, so here is what their sources (vLLM 0.32 and
0.33) need. `recorded` checks what each launch is given, and runs the numpy code.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.triton_utils.dispatcher import KernelOverride

from vllm_dllm.engine.cpu.block_tables import CpuBlockTables

INTS = {torch.int32, torch.int64}


@dataclass(frozen=True)
class Pointer:
    """A pointer argument: how its elements are addressed, and what they may be."""

    dim: int = 1  # of 2 the kernel gets the stride of rows, and takes their elements to be neighbours; 0: of either
    dtypes: set[torch.dtype] = field(default_factory=lambda: INTS)
    may_be_none: bool = False

    def check(self, given: Any) -> str | None:
        """Return what is wrong with what was given."""
        if given is None:
            return None if self.may_be_none else "is None"
        if not isinstance(given, Tensor):
            return f"is a {type(given).__name__}"
        if given.dtype not in self.dtypes:
            return f"is {given.dtype}"
        dim = self.dim or given.dim()
        is_flat = given.dim() > 0 and given.numel() == given.shape[0]  # [num_slots, 1] has a number for each slot
        if given.dim() != dim and not (dim == 1 and is_flat):
            return f"is {list(given.shape)}"
        is_dense = given.numel() == 0 or (given.stride(-1) == 1 if dim == 2 else given.is_contiguous())
        return None if is_dense else f"has strides {given.stride()}"


ONE, ROWS, NONE = Pointer(), Pointer(dim=2), Pointer(may_be_none=True)

POINTERS: dict[str, dict[str, Pointer]] = {
    "apply_write": {
        "output_ptr": Pointer(dim=0, dtypes={*INTS, torch.float32}),
        "write_indices_ptr": ONE,
        "write_starts_ptr": ONE,
        "write_contents_ptr": Pointer(dtypes={*INTS, torch.float32}),
        "write_cu_lens_ptr": ONE,
        "write_group_ids_ptr": NONE,
    },
    "expand_idx_mapping": dict.fromkeys(
        ("idx_mapping_ptr", "expanded_idx_mapping_ptr", "expanded_local_pos_ptr", "cu_num_logits_ptr"), ONE
    ),
    "prepare_prefill_inputs": {
        "input_ids_ptr": ONE,
        "next_prefill_tokens_ptr": ROWS,
        "idx_mapping_ptr": ONE,
        "query_start_loc_ptr": ONE,
        "all_token_ids_ptr": ROWS,
        "prefill_lens_ptr": ONE,
        "num_computed_tokens_ptr": ONE,
    },
    "prepare_pos_seq_lens": dict.fromkeys(
        ("pos_ptr", "seq_lens_ptr", "idx_mapping_ptr", "query_start_loc_ptr", "num_computed_tokens_ptr"), ONE
    ),
    "combine_sampled_and_draft_tokens": {
        "input_ids_ptr": ONE,
        "idx_mapping_ptr": ONE,
        "last_sampled_tokens_ptr": ONE,
        "query_start_loc_ptr": ONE,
        "seq_lens_ptr": ONE,
        "prefill_len_ptr": ONE,
        "draft_tokens_ptr": ROWS,
        "cu_num_logits_ptr": ONE,
        "logits_indices_ptr": ONE,
    },
    "post_update": {
        "idx_mapping_ptr": ONE,
        "num_computed_tokens_ptr": ONE,
        "last_sampled_tokens_ptr": ONE,
        "output_bin_counts_ptr": Pointer(dim=2, may_be_none=True),
        "sampled_tokens_ptr": ROWS,
        "num_sampled_ptr": ONE,
        "num_rejected_ptr": ONE,
        "query_start_loc_ptr": NONE,
        "all_token_ids_ptr": ROWS,
        "total_len_ptr": ONE,
        "draft_tokens_ptr": NONE,  # 0.33, of pipeline stages
        "draft_tokens_out_ptr": Pointer(dim=2, may_be_none=True),  # read where the one before is given
    },
    # Their kernels get all tables as addresses, which vLLM makes itself; the methods around them get these.
    "gather_block_tables": {"idx_mapping": ONE, "num_computed_tokens": NONE},  # the latter 0.33, of sliding windows
    "compute_slot_mappings": {"idx_mapping": ONE, "query_start_loc": ONE, "positions": ONE},
}


def lens(cu_lens: Tensor, number: int) -> Tensor:
    return cu_lens[1 : number + 1] - cu_lens[:number]


def expand_fits(given: dict[str, Any]) -> bool:
    """One tile has all rows of a request; what is behind it stays as it was allocated."""
    each = lens(given["cu_num_logits_ptr"], len(given["idx_mapping_ptr"]))
    return int(each.max()) <= given["BLOCK_SIZE"] and int(each.sum()) == len(given["expanded_local_pos_ptr"])


def prefill_fits(given: dict[str, Any]) -> bool:
    """All that is scheduled of a prompt is read where the sequence lies."""
    slots = given["idx_mapping_ptr"]
    each = lens(given["query_start_loc_ptr"], len(slots))
    computed = given["num_computed_tokens_ptr"][slots]
    is_prompt = computed < given["prefill_lens_ptr"][slots]
    ends = ((computed + each) * is_prompt).max()
    lookahead = given["next_prefill_tokens_ptr"].shape[0]
    return int(ends) <= given["all_token_ids_ptr"].shape[1] and lookahead <= given["LOOKAHEAD_BLOCK"]


def combine_fits(given: dict[str, Any]) -> bool:
    """One tile has all rows of a request, each of whose drafts is read from the request's row of drafts."""
    each = lens(given["cu_num_logits_ptr"], len(given["idx_mapping_ptr"]))
    drafts = each - given["NUM_NEW_SAMPLED_TOKENS"]
    scheduled = lens(given["query_start_loc_ptr"], len(each))
    return (
        int(each.max()) <= given["BLOCK_SIZE"]
        and int(drafts.max()) <= given["draft_tokens_ptr"].shape[1]
        and bool((each <= scheduled).all())
        and int(each.sum()) == len(given["logits_indices_ptr"])
    )


def update_fits(given: dict[str, Any]) -> bool:
    """What is emitted is in its row, and the sequence has room for it; no request goes back before its beginning."""
    slots, emitted = given["idx_mapping_ptr"], given["num_sampled_ptr"][: len(given["idx_mapping_ptr"])]
    if bool((slots < 0).any()):
        return False
    scheduled = lens(given["query_start_loc_ptr"], len(slots))
    computed = given["num_computed_tokens_ptr"][slots] + scheduled - given["num_rejected_ptr"][: len(slots)]
    total = given["total_len_ptr"][slots] + emitted
    width = given["all_token_ids_ptr"].shape[1]
    return (
        int(emitted.min()) >= 0
        and int(emitted.max()) <= given["sampled_tokens_ptr"].shape[1]
        and int(total.max()) <= width
        and int(computed.min()) >= 0
        and int(computed.max()) <= width
    )


def slots_fit(given: dict[str, Any]) -> bool:
    """Each scheduled position has an entry in its request's table: it is read without a check."""
    positions = given["positions"][: int(given["query_start_loc"][len(given["idx_mapping"])])]
    self = given["self"]
    sizes = zip(self.block_tables, self.block_sizes, strict=True)
    return all(int(positions.max()) // size < table.gpu.shape[1] for table, size in sizes)


FITS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "expand_idx_mapping": expand_fits,
    "prepare_prefill_inputs": prefill_fits,
    "combine_sampled_and_draft_tokens": combine_fits,
    "post_update": update_fits,
    "compute_slot_mappings": slots_fit,
}


def faults(kernel: str, given: dict[str, Any]) -> list[str]:
    """Return what of a launch its kernel cannot take."""
    found, pointers = [], POINTERS[kernel]
    for name, value in given.items():
        if name in pointers:
            wrong = pointers[name].check(value)
            found += [f"{kernel}: {name} {wrong}"] if wrong else []
        elif isinstance(value, Tensor):
            found.append(f"{kernel}: {name} is a tensor that this table does not know; read the kernel")
        elif type(value) not in {int, bool, type(None)} and name not in {"self"}:  # Triton knows no numpy scalars
            found.append(f"{kernel}: {name} is a {type(value).__name__}")
    if not found and kernel in FITS and not FITS[kernel](given):
        found.append(f"{kernel}: {FITS[kernel].__doc__} Not so: {given}")
    return found


@contextmanager
def recorded() -> Iterator[dict[str, list[str]]]:
    """Check every launch that this process makes meanwhile; yields what was wrong, by kernel."""
    found: dict[str, list[str]] = {}
    launch = KernelOverride._launch

    def checked(self: KernelOverride, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(self.arg_names, args, strict=False)) | kwargs
        given.pop("num_warps", None)
        found.setdefault(self.__name__, []).extend(faults(self.__name__, given))
        return launch(self, *args, **kwargs)

    def method(name: str, arguments: tuple[str, ...]) -> Callable[..., Any]:
        right = getattr(CpuBlockTables, name)

        def called(self: CpuBlockTables, *args: Any, **kwargs: Any) -> Any:
            given = {"self": self} | dict(zip(arguments, args, strict=False)) | kwargs
            given = {key: value for key, value in given.items() if key not in {"out", "out_ptrs"}}
            found.setdefault(name, []).extend(faults(name, given))
            return right(self, *args, **kwargs)

        return called

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KernelOverride, "_launch", checked)
        gather = ("idx_mapping", "num_reqs_padded", "out", "out_ptrs", "num_computed_tokens")
        patch.setattr(CpuBlockTables, "gather_block_tables", method("gather_block_tables", gather))
        slots = ("idx_mapping", "query_start_loc", "positions", "num_tokens_padded", "out")
        patch.setattr(CpuBlockTables, "compute_slot_mappings", method("compute_slot_mappings", slots))
        yield found


def check_arguments(run: Callable[[], Any]) -> None:
    """Run something, and check that each of the eight kernels was launched, and with what it relies on."""
    with recorded() as found:
        run()
    assert set(found) == set(POINTERS)
    wrong = sorted({line for lines in found.values() for line in lines})
    assert not wrong, "\n".join(wrong)
