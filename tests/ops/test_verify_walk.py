"""`verify_walk` equals `draft.verify.accept`, on each device."""

import re

import pytest
import torch
from torch import Tensor
from vllm_dllm.draft.verify import accept

from tests.ops import simt
from vllm_dllm.ops import verify_walk

SIZES = [(1, 1, 4), (1, 2, 1), (3, 5, 7), (7, 11, 32), (33, 33, 8), (2, 65, 113)]
"""(num_reqs, num_nodes, block_length)"""


def random_call(num_reqs: int, num_nodes: int, block_length: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw canvases with repetitions whose next canvases go forward in an order of contents, so that walks end."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (num_reqs, num_nodes), generator=generator)

    contents = torch.randint(0, 2, (num_reqs, num_nodes + 1, block_length), generator=generator)
    contents[..., -1] = 2**40 * torch.arange(num_nodes + 1)  # what tells them apart comes last
    content = draw(0, num_nodes)
    following = (content + draw(1, 4)).clamp(max=num_nodes)  # number num_nodes is nobody's canvas
    following[::3, 0] = content[::3, 0]  # finished roots

    def take(which: Tensor) -> Tensor:
        return contents.gather(1, which[..., None].expand(-1, -1, block_length))

    return take(content), take(following), torch.rand(num_reqs, num_nodes, generator=generator) < 0.8


def check_equal(call: tuple[Tensor, Tensor, Tensor], where: str) -> int:
    """Compare with the torch twin; returns the longest walk."""
    expected = accept(*call)
    if where == "simt":
        node, num_accepted = simt.ops().verify_walk(*call)
    else:
        node, num_accepted = verify_walk(*(tensor.to(where) for tensor in call))
    assert torch.equal(node.cpu(), expected.node)
    assert torch.equal(num_accepted.cpu(), expected.num_accepted)
    return int(num_accepted.max())


@pytest.mark.parametrize("where", ["cpu", "simt"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_the_torch_twin(size, where):
    longest = max(check_equal(random_call(*size, seed), where) for seed in range(20))
    assert longest >= min(size[1] - 1, 3)


def test_a_long_chain():
    canvas = torch.arange(64)[None, :, None].expand(1, 64, 3).contiguous()
    is_valid = torch.ones(1, 64, dtype=torch.bool)
    node, num_accepted = verify_walk(canvas, canvas + 1, is_valid)
    assert (node.tolist(), num_accepted.tolist()) == ([63], [63])


def test_a_circle_ends():
    canvas = torch.tensor([[[0], [1], [2]]])
    _, num_accepted = verify_walk(canvas, torch.tensor([[[1], [2], [1]]]), torch.ones(1, 3, dtype=torch.bool))
    assert num_accepted.tolist() == [2]


def test_no_requests():
    node, num_accepted = verify_walk(*random_call(0, 3, 4, 0))
    assert node.shape == num_accepted.shape == (0,)


def test_opcheck():
    call = random_call(3, 5, 7, 0)
    verify_walk(*call)
    torch.library.opcheck(torch.ops.vllm_dllm.verify_walk.default, call)


def test_can_be_traced():
    def total(canvas: Tensor, next_canvas: Tensor, is_valid: Tensor) -> Tensor:
        node, num_accepted = verify_walk(canvas, next_canvas, is_valid)
        return node + num_accepted

    call = random_call(7, 11, 4, 0)
    assert torch.equal(torch.compile(total, fullgraph=True, backend="eager")(*call), total(*call))


CANVAS, IS_VALID = torch.zeros(2, 3, 4, dtype=torch.int64), torch.ones(2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("canvas", "next_canvas", "is_valid", "message"),
    [
        (CANVAS[0], CANVAS, IS_VALID, "canvas must be [num_reqs, num_nodes, block_length] with the root, got [3, 4]; "),
        (CANVAS[:, :0], CANVAS, IS_VALID, "canvas must be [num_reqs, num_nodes, block_length] with the root, got [2, "),
        (
            CANVAS,
            CANVAS[:, :2],
            IS_VALID,
            "next_canvas must be [2, 3, 4], got [2, 2, 4]; give the next canvas of every node",
        ),
        (CANVAS, CANVAS, IS_VALID[:1], "is_valid must be [2, 3], got [1, 3]; give one bool for every node"),
        (CANVAS, CANVAS.int(), IS_VALID, "next_canvas must be Long, got Int; convert it with .to()"),
        (CANVAS, CANVAS, IS_VALID.long(), "is_valid must be Bool, got Long; convert it with .to()"),
        (CANVAS.mT.contiguous().mT, CANVAS, IS_VALID, "canvas must be contiguous, got strides [12, 1, 3]; call "),
    ],
    ids=["dim", "no root", "next_canvas", "is_valid", "next_canvas type", "is_valid type", "strides"],
)
def test_bad_calls_say_what_is_wrong(canvas, next_canvas, is_valid, message):
    with pytest.raises(RuntimeError, match=re.escape(f"verify_walk: {message}")):
        verify_walk(canvas, next_canvas, is_valid)


@pytest.mark.gpu
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_cuda_equals_the_torch_twin(size):
    assert all(check_equal(random_call(*size, seed), "cuda") >= 0 for seed in range(5))


@pytest.mark.gpu
def test_cuda_can_be_captured_in_a_graph():
    """A capture fails unless the launch goes to the current stream and nothing synchronises."""
    call = [tensor.cuda() for tensor in random_call(7, 11, 4, 0)]
    expected = verify_walk(*call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = verify_walk(*call)
    for tensor in result:
        tensor.fill_(-1)
    graph.replay()
    assert all(torch.equal(*pair) for pair in zip(result, expected, strict=True))
