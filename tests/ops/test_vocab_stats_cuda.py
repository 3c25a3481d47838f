"""CUDA's `vocab_stats`, on the emulator and on a GPU, equals the CPU twin and the sums in float64."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from tests.ops import simt
from tests.ops.vocab import assert_sampled_sums
from vllm_dllm.ops.vocab_stats import PartialStats, RowSampling, vocab_stats

SIZES = [(1, 1), (3, 7), (7, 113), (2, 8192), (2, 8193), (1, 20_011)]
"""(num_rows, num_ids); a CTA takes 8192 ids."""
EPS = 2.0**-24
MAX_GUMBEL = 37.0  # 53 random bits


@dataclass(frozen=True)
class Call:
    rows: Tensor
    sampling: RowSampling | None = None
    excluded_ids: tuple[int, ...] = ()
    num_candidates: int = 8
    first_id: int = 0


@pytest.fixture(params=[simt.WHERE, pytest.param("cuda", marks=pytest.mark.gpu)])
def where(request) -> str:
    return request.param


def by_cuda(call: Call, where: str) -> PartialStats:
    """Run the CUDA kernels of a call; the results are on the CPU."""
    if where == "cuda":
        stats = by_op(to_cuda(call))
        return PartialStats(*(tensor.cpu() for tensor in stats.tensors))
    noise, filters = call.sampling, call.sampling
    if noise is not None and not noise.has_filter:
        filters = None
    return PartialStats(
        *simt.ops().vocab_stats(
            call.rows,
            None,
            call.first_id,
            call.excluded_ids,
            call.num_candidates,
            noise is not None,
            noise and noise.keys,
            noise and noise.temperature,
            filters and filters.top_k,
            filters and filters.top_p,
            None,
            None,
        )[: 7 if noise is None else 9]
    )


def to_cuda(call: Call) -> Call:
    """Move a call, alignment and strides as they are."""
    whole = call.rows.as_strided((call.rows.untyped_storage().nbytes() // call.rows.element_size(),), (1,), 0).cuda()
    rows = whole.as_strided(call.rows.shape, call.rows.stride(), call.rows.storage_offset())
    sampling = call.sampling
    if sampling is not None:
        names = ("temperature", "top_k", "top_p", "keys")
        sampling = replace(sampling, **{name: getattr(sampling, name).cuda() for name in names})
    return replace(call, rows=rows, sampling=sampling)


def by_op(call: Call) -> PartialStats:
    """Run the op where the rows are."""
    return vocab_stats(
        call.rows,
        None,
        first_id=call.first_id,
        excluded_ids=call.excluded_ids,
        num_candidates=call.num_candidates,
        sampling=call.sampling,
    )


def check_sums(call: Call, stats: PartialStats) -> None:
    """Compare with float64.

    Of each term: a rounding of the difference from the largest, two of the exponential and one of the product; and one
    for each of the 32 float32 sums that it goes through.
    """
    logits = call.rows.double()  # exact
    logits[:, [i - call.first_id for i in call.excluded_ids]] = -torch.inf
    largest, argmax = logits.max(1, keepdim=True)
    below = logits - largest
    mass = below.exp().scatter(1, argmax, 0.0)
    terms = torch.where(mass == 0, 0.0, below * mass)
    roundings = EPS * (36 - torch.where(mass == 0, 0.0, below))
    assert ((stats.rest - mass.sum(1)).abs() <= (roundings * mass).sum(1)).all()
    assert ((stats.weighted - terms.sum(1)).abs() <= (roundings * -terms).sum(1)).all()
    if call.sampling is not None:
        assert_sampled_sums(stats, logits, call.sampling)


def check_equal(call: Call, where: str) -> PartialStats:
    """Compare with the CPU twin; returns the statistics.

    The emulator has the CPU's logarithms. A GPU's are as good, so each of the two that noise takes may differ by an
    ulp.
    """
    stats, expected = by_cuda(call, where), by_op(call)
    assert torch.equal(stats.top_ids, expected.top_ids)
    assert torch.equal(stats.top_logits, expected.top_logits)
    assert torch.equal(stats.token_ids, expected.token_ids)
    assert torch.equal(stats.token_logits, expected.token_logits)
    if where == "simt" or call.sampling is None:
        assert torch.equal(stats.scores, expected.scores)
    else:
        ulp = torch.finfo(torch.float64).eps * (MAX_GUMBEL * call.sampling.temperature + expected.scores.abs())
        is_close = (stats.scores - expected.scores).abs() <= 4 * ulp
        assert (is_close | (stats.scores == expected.scores)).all()
    return stats


def random_logits(num_rows: int, num_ids: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (4 * torch.randn(num_rows, num_ids, generator=generator)).to(dtype)


def sampling_of(
    num_rows: int, temperatures: list[float], *, top_k: list[int] | None = None, top_p: list[float] | None = None
) -> RowSampling:
    """Repeat the parameters over the rows."""

    def repeat(values: list[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).repeat(num_rows)[:num_rows]

    generator = torch.Generator().manual_seed(num_rows)
    return RowSampling(
        temperature=repeat(temperatures, torch.float64),
        top_k=repeat(top_k or [0], torch.int64),
        top_p=repeat(top_p or [1.0], torch.float64),
        keys=torch.randint(-(2**63), 2**63 - 1, (num_rows,), generator=generator),
        has_filter=top_k is not None or top_p is not None,
        wants_sampled=True,
    )


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_best_ids_and_sums(size, dtype, where):
    call = Call(random_logits(*size, dtype), num_candidates=3)
    check_sums(call, check_equal(call, where))


@pytest.mark.parametrize("num_candidates", [1, 8])
def test_equal_logits_go_to_the_lowest_id(num_candidates, where):
    logits = random_logits(5, 9001).round().clamp(max=3)
    call = Call(logits, num_candidates=num_candidates)
    stats = check_equal(call, where)
    assert torch.equal(stats.top_ids[:, 0], logits.argmax(1))
    check_sums(call, stats)


def test_excluded_ids_and_a_shard(where):
    call = Call(random_logits(4, 8200), excluded_ids=(1000, 1003, 9199), first_id=1000)
    stats = check_equal(call, where)
    assert not set(stats.top_ids.flatten().tolist()) & set(call.excluded_ids)
    check_sums(call, stats)


def test_rows_that_are_not_aligned(where):
    rows = random_logits(5, 8300, torch.bfloat16)[:, 3:8230]
    call = Call(rows, sampling_of(5, [0.7]))
    check_sums(call, check_equal(call, where))


def test_rows_without_candidates_and_with_nan(where):
    rows = torch.full((4, 8200), -torch.inf)
    rows[1, 8195] = 2.0
    rows[2] = random_logits(1, 8200)
    rows[2, 17] = torch.nan
    rows[3, 4] = torch.nan
    for sampling in (None, sampling_of(4, [1.0]), sampling_of(4, [1.0], top_k=[3], top_p=[0.9])):
        stats = check_equal(Call(rows, sampling), where)
        assert torch.equal(stats.rest.isnan(), torch.tensor([False, False, True, True]))
        for sums in (stats.weighted, *stats.tensors[7:]):
            assert torch.equal(sums.isnan(), torch.tensor([False, False, True, True]))
            assert sums[:2].tolist() == [0.0, 0.0]
        assert stats.token_ids.tolist()[:2] == [0, 8195]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_drawn_tokens(size, where):
    for seed in range(3):
        call = Call(random_logits(*size, seed=seed), sampling_of(size[0], [1.0, 0.0, 0.3, 1e-3, 50.0]))
        check_sums(call, check_equal(call, where))


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e30, 1e300])
def test_extreme_temperatures(temperature, where):
    logits = random_logits(3, 8300).round()  # many are the largest
    logits[0, 5:] = -torch.inf
    call = Call(logits, sampling_of(3, [temperature]))
    check_sums(call, by_cuda(call, where))


FILTERS = {
    "top_k": ([1, 7, 100, 99_999], None),
    "top_p": (None, [0.9, 0.5, 1e-6, 0.999]),
    "both": ([50, 7, 0], [0.8, 1.0]),
}


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_filtered_tokens(name, dtype, where):
    top_k, top_p = FILTERS[name]
    for seed in range(3):
        logits = random_logits(6, 5003, dtype, seed)
        call = Call(logits, sampling_of(6, [1.0, 0.7, 3.0, 0.0, 20.0], top_k=top_k, top_p=top_p))
        check_sums(call, check_equal(call, where))


@pytest.mark.parametrize("low", [-1.0, -9.0])
def test_a_filter_that_ends_in_a_segment(low, where):
    """The last kept id ties with others of its segment, and of segments of which all ids or none are kept."""
    logits = torch.full((2, 20_000), low)
    logits[:, [7, 8192, 9_000]] = torch.tensor([2.0, 2.0, 3.0])
    logits[1] = logits[1].flip(0)
    call = Call(logits, sampling_of(2, [0.5], top_p=[0.85]))
    check_sums(call, check_equal(call, where))


def test_sampled_sums_that_nobody_wants_are_not_there(where):
    call = Call(random_logits(5, 8300), sampling_of(5, [0.7], top_k=[9]))
    wanted = by_cuda(call, where)
    if where == "simt":
        sampling = call.sampling
        own = (sampling.keys, sampling.temperature, sampling.top_k, sampling.top_p)
        unwanted = simt.ops().vocab_stats(call.rows, None, 0, (), 8, False, *own, None, None)
        assert [len(sums) for sums in unwanted[7:9]] == [0, 0]
    else:
        unwanted = by_cuda(replace(call, sampling=replace(call.sampling, wants_sampled=False)), where).tensors
    for a, b in zip(unwanted[:7], wanted.tensors[:7], strict=True):
        assert torch.equal(a, b)


def test_a_filter_that_ends_among_equal_logits(where):
    """Four ids of a quarter each: top_p keeps the lowest of them."""
    logits = torch.full((64, 4100), -torch.inf)
    logits[:, [5, 77, 2049, 4099]] = 1.0
    for top_p, kept in ((0.2, {5}), (0.5, {5, 77}), (0.7, {5, 77, 2049}), (0.9, {5, 77, 2049, 4099})):
        stats = by_cuda(Call(logits, sampling_of(64, [1.0], top_p=[top_p])), where)
        assert set(stats.token_ids.tolist()) == kept


def test_a_row_alone_is_as_in_company(where):
    logits = random_logits(5, 8300)
    sampling = sampling_of(5, [1.0, 0.5], top_k=[0, 9], top_p=[0.9])
    together = by_cuda(Call(logits, sampling), where)
    for row in range(5):
        alone = by_cuda(Call(logits[row : row + 1], sampling.rows(row, row + 1)), where)
        for a, b in zip(alone.tensors, together.tensors, strict=True):
            assert torch.equal(a[0], b[row])


@pytest.mark.slow("kernels")
def test_a_weight_is_refused():
    rows = torch.ones(2, 8)
    with pytest.raises(RuntimeError, match=r"a weight is given with rows on a GPU, .*; allowed is None; give logits"):
        simt.ops().vocab_stats(rows, torch.ones(5, 8), 0, (), 1, False, *(None,) * 6)


@pytest.mark.gpu
def test_cuda_can_be_captured_in_a_graph():
    """A capture fails unless the launches go to the current stream and nothing synchronises."""
    call = to_cuda(Call(random_logits(5, 8300), sampling_of(5, [1.0, 0.5], top_k=[0, 9], top_p=[0.9])))
    expected = by_op(call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stats = by_op(call)
    stats.scores.zero_()
    graph.replay()
    assert torch.equal(stats.scores, expected.scores)
