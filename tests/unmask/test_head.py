"""All ways to the statistics of hidden rows agree: by weight, by shards of it, by logits, natively and by torch."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vllm_dllm import noise
from vllm_dllm.ops.vocab_stats import PartialStats, RowIds, RowSampling
from vllm_dllm.unmask import head as head_module
from vllm_dllm.unmask.head import NATIVE_ROWS, Head, LogitsHead, MergedHead, WeightHead, _pack

VOCAB, HIDDEN, ROWS, MASK = 113, 33, 21, 5
NUM_GREEDY = 11  # numbers of a greedy row: three candidates and their logits, and the next five fields
EXACT = ("top_ids", "token_ids")
ROUNDED = (
    "top_logits",
    "rest",
    "weighted",
    "token_logits",
    "scores",
    "sampled_rest",
    "sampled_weighted",
    "given_logits",
)
GENERATOR = torch.Generator().manual_seed(0)
WEIGHT = torch.randn(VOCAB, HIDDEN, generator=GENERATOR) / 2
HIDDEN_ROWS = torch.randn(ROWS, HIDDEN, generator=GENERATOR)


def sampling(*, has_filter: bool) -> RowSampling:
    row = torch.arange(ROWS)
    half = row.double() / 2
    return RowSampling(
        temperature=half % 1.5,
        top_k=(row % 4) * has_filter,
        top_p=1.0 - half % 1 * has_filter,
        keys=noise.stream_keys(torch.tensor(7), row, torch.tensor(3)),
        has_filter=has_filter,
        wants_sampled=True,
    )


def by_logits(*, is_native: bool) -> LogitsHead:
    return LogitsHead(lambda hidden: hidden @ WEIGHT.t(), VOCAB, MASK, is_native=is_native)


def own_weight(ids: slice) -> Head:
    return WeightHead(WEIGHT[ids], MASK, ids.start)


def own_logits(ids: slice) -> Head:
    """As of a GPU's rank: the product is a library's, with rows that pad the part."""
    padded = torch.cat([WEIGHT[ids], torch.full((3, HIDDEN), 9.0)])
    num_ids = ids.stop - ids.start
    return LogitsHead(
        lambda hidden: (hidden @ padded.t())[:, :num_ids], num_ids, MASK, is_native=True, first_id=ids.start
    )


def sharded(cut: int, ids: RowIds | None = None, part: Callable[[slice], Head] = own_weight) -> MergedHead:
    """The first of two ranks; the collective is played by the other rank's statistics."""
    other = part(slice(cut, VOCAB))

    def gather(own: Tensor) -> Tensor:
        # What follows the other columns are the sums of the sampled distribution, where they are wanted.
        is_greedy = own.shape[1] == NUM_GREEDY + (0 if ids is None else 8)
        theirs = other(HIDDEN_ROWS, None if is_greedy else sampling(has_filter=False), 3, ids)
        return torch.cat([own, _pack(theirs)], 1)

    return MergedHead(part(slice(0, cut)), by_logits(is_native=True), 2, gather)


HEADS: dict[str, Callable[..., Head]] = {
    "native logits": lambda _=None: by_logits(is_native=True),
    "weight": lambda _=None: WeightHead(WEIGHT, MASK),
    "two shards": lambda ids=None: sharded(64, ids),
    "two shards of logits": lambda ids=None: sharded(64, ids, own_logits),
}


def assert_close(got: PartialStats, expected: PartialStats) -> None:
    for name in EXACT:
        assert torch.equal(getattr(got, name), getattr(expected, name)), name
    rounding = HIDDEN * 2**-23 * 10  # of float32 sums of so many terms, in logits up to 10
    for name in ROUNDED:
        if getattr(expected, name) is None:
            continue
        a, b = getattr(got, name).double(), getattr(expected, name).double()
        assert torch.allclose(a, b, rtol=rounding, atol=rounding), name


@pytest.mark.parametrize("has_filter", [False, True])
@pytest.mark.parametrize("name", HEADS)
def test_heads_agree(name: str, has_filter: bool) -> None:
    expected = by_logits(is_native=False)(HIDDEN_ROWS, sampling(has_filter=has_filter), 3)
    found = HEADS[name]()(HIDDEN_ROWS, sampling(has_filter=has_filter), 3)
    assert_close(found, expected)
    assert all(column.is_contiguous() for column in found.tensors)  # as the op `decide_walk` wants them


@pytest.mark.parametrize("name", HEADS)
def test_heads_agree_on_greedy_rows(name: str) -> None:
    found, expected = (head(HIDDEN_ROWS, None, 3) for head in (HEADS[name](), by_logits(is_native=False)))
    for own in ("top_ids", "token_ids"):
        assert torch.equal(getattr(found, own), getattr(expected, own)), own
    assert found.sampled_rest is None


@pytest.mark.parametrize("name", HEADS)
def test_heads_agree_on_what_rows_ask_for_and_may_take(name: str) -> None:
    """Each row asks for ids of both shards, one of them twice, and for none; half of the words allow every other id."""
    given = 7 + torch.arange(ROWS)[:, None] + torch.tensor([0, 30, 60, 60, 70, 80, 0, 0])
    allowed = torch.where(torch.arange(4) % 2 == 0, 0x55555555, -1).int().repeat(ROWS, 1)
    given[:, 6:] = torch.tensor([MASK, -1])
    ids = RowIds(given, allowed)
    for rows in (None, sampling(has_filter=False), sampling(has_filter=True)):
        expected = by_logits(is_native=False)(HIDDEN_ROWS, rows, 3, ids)
        head = HEADS[name](ids)
        for each in (head, getattr(head, "own", head), getattr(head, "whole", head)):
            if not isinstance(each, MergedHead):
                each.chunk_rows = 4  # type: ignore[misc]
        found = head(HIDDEN_ROWS, rows, 3, ids)
        is_out = expected.given_logits == -torch.inf  # type: ignore[union-attr]
        assert torch.equal(found.given_logits == -torch.inf, is_out)  # type: ignore[arg-type]
        assert 0.2 < is_out.double().mean() < 0.9
        assert_close(
            PartialStats.of(lambda c: c.nan_to_num(), found), PartialStats.of(lambda c: c.nan_to_num(), expected)
        )


def test_the_filter_of_one_row_changes_no_other_across_shards() -> None:
    """Rows without a filter keep the fused product's logits, though others need theirs whole."""
    plain = sharded(64)(HIDDEN_ROWS, sampling(has_filter=False), 3)
    filtered = sharded(64)(HIDDEN_ROWS, sampling(has_filter=True), 3)
    same = ~sampling(has_filter=True).is_filtered()
    assert 0 < same.sum() < ROWS
    for a, b in zip(plain.tensors, filtered.tensors, strict=True):
        assert torch.equal(a[same], b[same])


@pytest.mark.parametrize("is_native", [False, True])
def test_chunks_change_nothing(is_native: bool) -> None:
    head = by_logits(is_native=is_native)
    whole = head(HIDDEN_ROWS, sampling(has_filter=True), 3)
    head.chunk_rows = 4
    assert_close(head(HIDDEN_ROWS, sampling(has_filter=True), 3), whole)


@pytest.mark.parametrize("vocab_size", [259, 4096, 126464, 10**9])
def test_chunks_of_logits_stay_below_the_bound(vocab_size: int) -> None:
    rows = LogitsHead(lambda hidden: hidden, vocab_size, MASK, is_native=False).chunk_rows
    assert rows >= 1
    assert rows == 1 or rows * vocab_size * 8 <= head_module.TORCH_BYTES


def test_the_op_takes_whole_tiles_of_rows_in_as_few_products_as_fit() -> None:
    """Each product reads the head's weights again, and a GPU computes 128 rows where there are fewer in a tile."""
    asked: list[int] = []

    def head_logits(hidden: Tensor) -> Tensor:
        asked.append(len(hidden))
        return hidden @ WEIGHT.t()

    head = LogitsHead(head_logits, VOCAB, MASK, is_native=True)
    rows = HIDDEN_ROWS[torch.arange(2 * NATIVE_ROWS + 5) % ROWS]
    found = head(rows, None, 3)
    assert asked == [NATIVE_ROWS, NATIVE_ROWS, 5]
    assert NATIVE_ROWS % 128 == 0
    assert torch.equal(found.token_ids, head(HIDDEN_ROWS, None, 3).token_ids[torch.arange(len(rows)) % ROWS])
