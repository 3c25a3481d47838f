"""The columns of a step's report."""

from vllm_dllm.state.counters import MAX_DEPTH, REPORT_LEN, Column


def test_columns_fill_the_report_and_depths_are_last() -> None:
    assert [*Column] == list(range(len(Column)))
    assert max(Column) is Column.PROPOSED
    assert REPORT_LEN == Column.PROPOSED + MAX_DEPTH
