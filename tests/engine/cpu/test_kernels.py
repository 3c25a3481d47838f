"""Each replacement leaves the same memory as the Triton kernel it stands for, interpreted on the same inputs."""

import copy
import importlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction
from vllm.triton_utils.dispatcher import KernelOverride
from vllm.v1.worker.cpu.buffer_utils import UvaBuffer

from vllm_dllm.engine.contracts import CONTRACTS
from vllm_dllm.engine.cpu import binding, kernels
from vllm_dllm.engine.cpu.block_tables import CpuBlockTables

RUNNER = "vllm.v1.worker.gpu"
RECORDED_0_33 = json.loads(Path(__file__).with_name("signatures_0_33.json").read_text())
NUM_SLOTS, MAX_MODEL_LEN, PAGE_SIZE = 11, 97, 4
Memory = dict[str, torch.Tensor]


def private_copy(module_name: str) -> ModuleType:
    """Load a second copy of a vLLM module: its kernels are the originals, whatever this process has replaced."""
    origin = importlib.util.find_spec(module_name)
    spec = importlib.util.spec_from_file_location(f"original_{module_name.rsplit('.', 1)[1]}", origin.origin)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def interpreted(kernel: Callable[..., None]) -> InterpretedFunction:
    """Give a kernel, which without Triton is a plain function, to Triton's interpreter."""
    function = getattr(kernel, "fn", kernel)
    for name in function.__annotations__:  # vLLM's stand-in for Triton annotates with a placeholder
        function.__annotations__[name] = tl.constexpr
    return InterpretedFunction(function)


@pytest.fixture(scope="module")
def originals() -> dict[str, ModuleType]:
    """The vLLM modules with their host functions and interpreted kernels, by short name."""
    modules = {name: private_copy(f"{RUNNER}.{name}") for name in ("buffer_utils", "input_batch", "block_table")}
    buffer_utils, block_table = modules["buffer_utils"], modules["block_table"]
    buffer_utils.UvaBuffer = UvaBuffer
    for name in ("StagedWriteTensor", "UvaBackedTensor", "_load_ptr"):
        setattr(block_table, name, getattr(buffer_utils, name))
    for module in modules.values():
        module.tl, module.triton = tl, triton
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            setattr(module, name, interpreted(getattr(module, name)))
    return modules


class Step:
    """Random request states and a batch over them: prefills and decodes, padded rows, stale values in the buffers."""

    def __init__(self, num_reqs: int, num_padded: int, seed: int) -> None:
        self.rng = np.random.default_rng([num_reqs, num_padded, seed])
        self.num_reqs, self.num_padded = num_reqs, num_padded
        self.idx_mapping = torch.from_numpy(self.rng.permutation(NUM_SLOTS)[:num_reqs].astype(np.int64))
        self.query_lens = self.rng.integers(1, 9, num_reqs)
        ends = self.query_lens.cumsum()
        self.num_tokens = int(ends[-1])
        self.query_start_loc = torch.full((num_reqs + num_padded + 1,), self.num_tokens, dtype=torch.int32)
        self.query_start_loc[0] = 0
        self.query_start_loc[1 : num_reqs + 1] = torch.from_numpy(ends)
        self.prefill_len = self.ints(1, 40, NUM_SLOTS)
        self.num_computed = self.ints(0, 40, NUM_SLOTS)

    def ints(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        """Draw integers in `[low, high)`."""
        return torch.from_numpy(self.rng.integers(low, high, shape)).to(dtype)


@pytest.fixture(params=[(1, 0, 0), (1, 2, 1), (3, 0, 2), (3, 1, 3), (7, 0, 4), (11, 0, 5)], ids=str)
def step(request: pytest.FixtureRequest) -> Step:
    """Batches of one request, a few, and all slots, with and without padded rows."""
    return Step(*request.param)


def assert_same_memory(
    module: ModuleType, kernel_name: str, memory: Memory, run: Callable[[Memory], Any], monkeypatch: Any
) -> Memory:
    """Run vLLM's host function with the interpreted kernel and with ours; compare all memory and what is returned."""
    full_name = f"{RUNNER}.{module.__name__.removeprefix('original_')}.{kernel_name}"
    kernel = getattr(module, kernel_name)
    arg_names = tuple(kernel.arg_names)
    ours = KernelOverride(kernel.fn, binding.bind(full_name, arg_names, binding.REPLACEMENTS[full_name]))
    memories = []
    for implementation in (kernel, ours):
        monkeypatch.setattr(module, kernel_name, implementation)
        own = copy.deepcopy(memory)
        own["returned"] = run(own)
        memories.append(own)
    expected, actual = memories
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")
    return actual


def test_prepare_pos_seq_lens(step: Step, originals: dict[str, ModuleType], monkeypatch: Any) -> None:
    module = originals["input_batch"]
    memory = {"pos": step.ints(0, 99, 128, dtype=torch.int64), "seq_lens": step.ints(0, 99, NUM_SLOTS + 2)}

    def run(m: Memory) -> None:
        module.prepare_pos_seq_lens(step.idx_mapping, step.query_start_loc, step.num_computed, m["pos"], m["seq_lens"])

    actual = assert_same_memory(module, "_prepare_pos_seq_lens_kernel", memory, run, monkeypatch)
    assert not torch.equal(actual["seq_lens"], memory["seq_lens"])


@pytest.mark.parametrize("num_lookahead", [1, 3])
def test_prepare_prefill_inputs(
    step: Step, num_lookahead: int, originals: dict[str, ModuleType], monkeypatch: Any
) -> None:
    module = originals["input_batch"]
    all_token_ids = step.ints(1, 999, NUM_SLOTS, MAX_MODEL_LEN)
    memory = {"input_ids": step.ints(0, 99, 128), "next": step.ints(0, 99, num_lookahead, NUM_SLOTS)}

    def run(m: Memory) -> None:
        module.prepare_prefill_inputs(
            m["input_ids"],
            m["next"],
            step.idx_mapping,
            step.query_start_loc,
            all_token_ids,
            step.prefill_len,
            step.num_computed,
        )

    actual = assert_same_memory(module, "_prepare_prefill_inputs_kernel", memory, run, monkeypatch)
    is_prefilling = step.num_computed[step.idx_mapping] < step.prefill_len[step.idx_mapping]
    assert bool(is_prefilling.any()) == (not torch.equal(actual["next"], memory["next"]))


@pytest.mark.parametrize("num_new", [0, 1])
def test_combine_and_expand_logits_rows(
    step: Step, num_new: int, originals: dict[str, ModuleType], monkeypatch: Any
) -> None:
    module = originals["input_batch"]
    num_logits = np.minimum(step.rng.integers(num_new, 6, step.num_reqs), step.query_lens)
    cu_num_logits = torch.from_numpy(np.concatenate([[0], num_logits.cumsum()]).astype(np.int32))
    seq_lens = step.num_computed[step.idx_mapping] + torch.from_numpy(step.query_lens).int()
    last_sampled = step.ints(0, 999, NUM_SLOTS, 1, dtype=torch.int64)
    drafts = step.ints(1000, 1999, NUM_SLOTS, 6, dtype=torch.int64)
    total = int(cu_num_logits[-1])

    def combine(m: Memory) -> torch.Tensor:
        return module.combine_sampled_and_draft_tokens(
            m["input_ids"],
            step.idx_mapping,
            last_sampled,
            step.query_start_loc,
            seq_lens,
            step.prefill_len,
            drafts,
            cu_num_logits,
            total,
            num_new,
        )

    def expand(m: Memory) -> torch.Tensor:
        slots, numbers = module.expand_idx_mapping(step.idx_mapping, total, cu_num_logits, 8)
        return torch.stack([slots, numbers.long()])

    memory = {"input_ids": step.ints(0, 99, 128)}
    actual = assert_same_memory(module, "_combine_sampled_and_draft_tokens_kernel", memory, combine, monkeypatch)
    assert actual["returned"].shape == (total,)
    actual = assert_same_memory(module, "_expand_idx_mapping_kernel", {}, expand, monkeypatch)
    assert actual["returned"].shape == (2, total)


@pytest.mark.parametrize("has_counts", [False, True])
@pytest.mark.parametrize("emits", ["nothing", "some", "with a skipped row"])
def test_post_update(
    step: Step, emits: str, has_counts: bool, originals: dict[str, ModuleType], monkeypatch: Any
) -> None:
    module = originals["input_batch"]
    num_sampled = step.ints(0, 6, step.num_reqs) * (emits != "nothing")
    num_rejected = step.ints(0, 5, step.num_reqs)
    sampled = step.ints(0, 4, step.num_reqs, 5, dtype=torch.int64)  # few tokens, so that they repeat
    idx_mapping = step.idx_mapping.clone()
    if emits == "with a skipped row":
        idx_mapping[-1] = -1
    memory = {
        "num_computed": step.num_computed,
        "last_sampled": step.ints(0, 99, NUM_SLOTS, 1, dtype=torch.int64),
        "counts": step.ints(0, 9, NUM_SLOTS, 5),
        "all_token_ids": step.ints(0, 99, NUM_SLOTS, MAX_MODEL_LEN),
        "total_len": step.ints(1, 80, NUM_SLOTS),
    }

    def run(m: Memory) -> None:
        module.post_update(
            idx_mapping,
            m["num_computed"],
            m["last_sampled"],
            m["counts"] if has_counts else None,
            sampled,
            num_sampled,
            num_rejected,
            step.query_start_loc if has_counts else None,
            m["all_token_ids"],
            m["total_len"],
        )

    assert_same_memory(module, "_post_update_kernel", memory, run, monkeypatch)


@pytest.mark.parametrize("shape", [(NUM_SLOTS,), (NUM_SLOTS, MAX_MODEL_LEN)], ids=["elements", "rows"])
@pytest.mark.parametrize("num_writes", [1, 5])
def test_apply_write(
    shape: tuple[int, ...], num_writes: int, originals: dict[str, ModuleType], monkeypatch: Any
) -> None:
    module = originals["buffer_utils"]
    rng = np.random.default_rng(num_writes)
    staged = []
    for slot in rng.permutation(NUM_SLOTS)[:num_writes].tolist():
        write_len = int(rng.integers(1, 20)) if len(shape) > 1 else 1
        start = int(rng.integers(0, MAX_MODEL_LEN - 20)) if len(shape) > 1 else 0
        staged.append((slot, start, rng.integers(0, 99, write_len).tolist()))

    def run(m: Memory) -> torch.Tensor:
        tensor = module.StagedWriteTensor(shape, torch.int32, torch.device("cpu"))
        tensor.gpu = m["stored"]
        for slot, start, values in staged:
            tensor.stage_write(slot, start, values)
        tensor.apply_write()
        return tensor.gpu

    memory = {"stored": torch.from_numpy(rng.integers(100, 199, shape)).int()}
    actual = assert_same_memory(module, "_apply_write_kernel", memory, run, monkeypatch)
    assert not torch.equal(actual["stored"], memory["stored"])


def make_tables(module: ModuleType, step: Step) -> Any:
    """Build the tables of all slots, with pages enough for every position, and stale values in the batch's tables."""
    num_pages = MAX_MODEL_LEN // PAGE_SIZE + 1
    tables = module.BlockTables([PAGE_SIZE], NUM_SLOTS + 2, 128, [num_pages], torch.device("cpu"))
    tables.block_tables[0].gpu.copy_(step.ints(1, 999, NUM_SLOTS + 2, num_pages))
    tables.num_blocks.np[:] = num_pages
    tables.num_blocks.copy_to_uva()
    tables.input_block_tables[0].fill_(-7)
    tables.slot_mappings.fill_(-7)
    return tables


def test_gather_block_tables(step: Step, originals: dict[str, ModuleType]) -> None:
    tables = make_tables(originals["block_table"], step)
    num_rows = step.num_reqs + step.num_padded
    expected = tables.gather_block_tables(step.idx_mapping, num_rows)[0].clone()
    tables.input_block_tables[0].fill_(-7)
    actual = CpuBlockTables.gather_block_tables(tables, step.idx_mapping, num_rows)[0]
    assert torch.equal(actual, expected)
    assert not tables.input_block_tables[0][step.num_reqs :].any()


@pytest.mark.parametrize("has_dummy", [False, True])
def test_compute_slot_mappings(step: Step, has_dummy: bool, originals: dict[str, ModuleType]) -> None:
    tables = make_tables(originals["block_table"], step)
    idx_mapping = step.idx_mapping.clone()
    if has_dummy:
        idx_mapping[0] = -1
    arguments = (
        idx_mapping,
        step.query_start_loc[: step.num_reqs + 1],
        step.ints(0, MAX_MODEL_LEN, 128, dtype=torch.int64),
        step.num_tokens + step.num_padded,
    )
    returned = tables.compute_slot_mappings(*arguments)
    expected, shape = tables.slot_mappings.clone(), returned.shape
    tables.slot_mappings.fill_(-7)
    assert CpuBlockTables.compute_slot_mappings(tables, *arguments).shape == shape
    assert torch.equal(tables.slot_mappings, expected)


@pytest.mark.parametrize("method", [CpuBlockTables.gather_block_tables, CpuBlockTables.compute_slot_mappings])
def test_block_tables_reject_other_layouts(
    method: Callable[..., Any], originals: dict[str, ModuleType], monkeypatch: Any
) -> None:
    step = Step(1, 0, 0)
    tables = make_tables(originals["block_table"], step)
    monkeypatch.setattr(tables, "cp_size", 2)
    with pytest.raises(NotImplementedError, match="no context parallelism"):
        method(tables, step.idx_mapping, step.query_start_loc, torch.zeros(128, dtype=torch.int64), 1)


def test_apply_write_rejects_several_groups() -> None:
    empty = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="several KV-cache groups"):
        kernels.apply_write(
            output_ptr=empty,
            write_indices_ptr=empty,
            write_starts_ptr=empty,
            write_contents_ptr=empty,
            write_cu_lens_ptr=empty,
            MULTI_GROUP=True,
        )


def live_arg_names(name: str) -> tuple[str, ...]:
    """Return the arguments of a kernel of the installed vLLM."""
    module_name, kernel_name = name.rsplit(".", 1)
    return binding.kernel_arg_names(getattr(importlib.import_module(module_name), kernel_name))


@pytest.mark.parametrize("version", ["installed", "0.33"])
@pytest.mark.parametrize("name", binding.REPLACEMENTS, ids=lambda name: name.rsplit(".", 1)[1])
def test_launch_binds_by_name(name: str, version: str) -> None:
    """Whatever the order of a version's arguments, each parameter gets the argument of its name."""
    arg_names = live_arg_names(name) if version == "installed" else tuple(RECORDED_0_33[name])
    impl = binding.REPLACEMENTS[name]
    received: dict[str, Any] = {}

    def spy(**kwargs: Any) -> None:
        received.update(kwargs)

    spy.__signature__ = inspect.signature(impl)
    launch = binding.bind(name, arg_names, spy)
    split = len(arg_names) - 1  # launches pass tensors by position and constants by name
    launch(*arg_names[:split], **{arg_names[split]: arg_names[split]})
    assert received == {arg: arg for arg in inspect.signature(impl).parameters if arg in arg_names}


def test_tables_accept_every_parameter() -> None:
    tables = {contract.attribute: contract for contract in CONTRACTS if contract.owner.endswith(":BlockTables")}
    for name, contract in tables.items():
        ours = tuple(inspect.signature(getattr(CpuBlockTables, name)).parameters)
        assert contract.most == ours
        for theirs in (RECORDED_0_33[f"{RUNNER}.block_table.BlockTables.{name}"], list(contract.parameters or ())):
            assert list(ours[: len(theirs)]) == theirs
    assert len(tables) == 2


def test_missing_argument_is_named() -> None:
    arg_names = tuple(inspect.signature(kernels.post_update).parameters.keys() - {"total_len_ptr"})
    with pytest.raises(RuntimeError, match="a_kernel of the installed vLLM has no argument total_len_ptr; it has"):
        binding.bind("a_kernel", arg_names, kernels.post_update)
