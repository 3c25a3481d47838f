"""`counter_uniform` equals `noise.uniform` bit for bit, on each device."""

import re

import pytest
import torch
from torch import Tensor

from vllm_dllm import noise
from vllm_dllm.ops import counter_uniform

SIZES = [(1, 1), (1, 113), (7, 33), (33, 7), (3, 4097)]
"""(num_rows, num_ids); the last is one id more than the CPU kernel's tile."""


def random_keys(num_rows: int) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (num_rows,))


def expected(keys: Tensor, first_id: int, num_ids: int) -> Tensor:
    return noise.uniform(keys[:, None], torch.arange(first_id, first_id + num_ids))


@pytest.mark.parametrize(("num_rows", "num_ids"), SIZES)
@pytest.mark.parametrize("first_id", [noise.STREAM, 0, 126_463])
def test_equals_the_reference(num_rows, num_ids, first_id):
    keys = random_keys(num_rows)
    assert torch.equal(counter_uniform(keys, first_id, num_ids), expected(keys, first_id, num_ids))


@pytest.mark.parametrize(("num_rows", "num_ids"), [(0, 7), (7, 0), (0, 0)])
def test_empty(num_rows, num_ids):
    result = counter_uniform(random_keys(num_rows), 0, num_ids)
    assert result.shape == (num_rows, num_ids)
    assert result.dtype == torch.float64


def test_strided_keys():
    keys = random_keys(33)[::2]
    assert torch.equal(counter_uniform(keys, 5, 7), expected(keys, 5, 7))


def test_extreme_keys_stay_inside_the_open_interval():
    keys = torch.tensor([0, -1, 2**63 - 1, -(2**63)])
    result = counter_uniform(keys, noise.STREAM, 113)
    assert torch.equal(result, expected(keys, noise.STREAM, 113))
    assert bool(((result > 0) & (result < 1)).all())


def test_opcheck():
    op = torch.ops.vllm_dllm.counter_uniform.default
    counter_uniform(random_keys(1), 0, 1)
    torch.library.opcheck(op, (random_keys(7), noise.STREAM, 33))


def test_can_be_traced():
    def twice(keys: Tensor) -> Tensor:
        return 2 * counter_uniform(keys, 0, 7)

    keys = random_keys(3)
    traced = torch.compile(twice, fullgraph=True, backend="eager")
    assert torch.equal(traced(keys), twice(keys))


@pytest.mark.parametrize(
    ("keys", "first_id", "num_ids", "message"),
    [
        (torch.zeros(3, 4, dtype=torch.int64), 0, 1, "keys must be [num_rows], got [3, 4]; flatten them"),
        (torch.zeros(3), 0, 1, "keys must be int64, got Float; make them with vllm_dllm.noise.stream_keys"),
        (torch.zeros(3, dtype=torch.int64), -2, 1, "first_id is -2; give a vocabulary id or -1"),
        (torch.zeros(3, dtype=torch.int64), 0, -1, "num_ids is -1; give 0 or more"),
    ],
    ids=["shape", "dtype", "first_id", "num_ids"],
)
def test_bad_calls_say_what_is_wrong(keys, first_id, num_ids, message):
    with pytest.raises(RuntimeError, match=re.escape(f"counter_uniform: {message}")):
        counter_uniform(keys, first_id, num_ids)


@pytest.mark.gpu
@pytest.mark.parametrize(("num_rows", "num_ids"), SIZES, ids=lambda size: f"small{size}")
def test_cuda_equals_the_cpu_twin(num_rows, num_ids):
    keys = random_keys(2 * num_rows)[::2]
    result = counter_uniform(keys.cuda()[:], noise.STREAM, num_ids)
    assert torch.equal(result.cpu(), counter_uniform(keys, noise.STREAM, num_ids))


@pytest.mark.gpu
def test_cuda_equals_the_cpu_twin_beyond_one_grid():
    keys = random_keys(160)
    assert torch.equal(counter_uniform(keys.cuda(), 0, 126_464).cpu(), counter_uniform(keys, 0, 126_464))


@pytest.mark.gpu
def test_cuda_can_be_captured_in_a_graph():
    """A capture fails unless the launch goes to the current stream and nothing synchronises."""
    keys = random_keys(33).cuda()
    expected_result = counter_uniform(keys, 0, 113)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = counter_uniform(keys, 0, 113)
    result.zero_()
    graph.replay()
    assert torch.equal(result, expected_result)
