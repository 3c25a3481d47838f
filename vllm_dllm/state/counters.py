"""What a step reports of each request."""

from enum import IntEnum

MAX_DEPTH = 16
"""Depth up to which drafts are counted apart; deeper ones count as this."""


class Column(IntEnum):
    """Columns of a step's report, `[num_reqs, REPORT_LEN] int32`; those from `PROPOSED` on count drafts by depth."""

    FORWARDS = 0  # 1 where the forward decided a step
    REFRESHES = 1  # 1 where K/V were recomputed
    UNMASKED = 2  # positions
    ACCEPTED = 3  # transitions made through accepted drafts, a next root among them
    FINISHED = 4  # 1 where the block was emitted
    STORED = 5  # positions before the block that the request has now; a block-causal model's have K/V in the cache
    COMMITS = 6  # 1 where the K/V of the block before were stored
    PROPOSED = 7  # drafts of depth 1 that were evaluated, next roots among them; the next columns: of 2..MAX_DEPTH


REPORT_LEN = Column.PROPOSED + MAX_DEPTH
