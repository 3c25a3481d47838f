"""Whose drafts are worth their rows: a request whose drafts never come true takes none from the others.

The budget of a step (`draft.budget`) follows from what drafts come to on the average of a batch. Of each request an
average of its own is kept, of accepted / expected; where it is below the share at which drafts only pay for their rows,
the request has none, but for rare probes. Like the budget this follows from reports alone, and changes no token.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

RATE = 0.05
"""Weight of a step in a request's average, which begins at 1: the batch's."""
SLACK = 0.8
"""A request has drafts until its average is below this part of the share at which they pay: averages are noisy."""
FIRST_WAIT, LONGEST_WAIT = 16, 256
"""Steps without drafts before a request is probed by one with them; twice as many from probe to probe."""


@dataclass(slots=True)
class _Average:
    ratio: float = 1.0  # of accepted / expected
    wait: int = FIRST_WAIT
    num_without: int = 0  # steps since the last with drafts


class RequestAcceptance:
    """What is known of the drafts of running requests."""

    def __init__(self) -> None:
        self._averages: defaultdict[str, _Average] = defaultdict(_Average)

    @property
    def known(self) -> set[str]:
        """Requests of which anything is remembered."""
        return set(self._averages)

    def pay(self, req_ids: Sequence[str], break_even: float) -> list[bool]:
        """Tell which of a step's requests are to have drafts; all where no one's pay: then the budget says how many.

        Args:
            req_ids: of the requests; one that is not known is taken for average.
            break_even: share of what is expected of a budget at which its drafts pay for their rows.
        """
        averages = [self._averages.get(req_id) for req_id in req_ids]
        pays = [a is None or a.ratio >= SLACK * break_even or a.num_without >= a.wait for a in averages]
        return pays if any(pays) else [True] * len(pays)

    def observe(self, req_id: str, accepted: int, expected: float, break_even: float) -> None:
        """Learn from a step.

        Args:
            req_id: of the request.
            accepted: transitions that it made through drafts.
            expected: of its drafts; 0 without any.
            break_even: as in `pay`.
        """
        average = self._averages[req_id]
        if expected <= 0:
            average.num_without += 1
            return
        average.ratio += RATE * (accepted / expected - average.ratio)
        is_probe, average.num_without = average.num_without >= average.wait, 0
        if average.ratio >= SLACK * break_even:
            average.wait = FIRST_WAIT
        elif is_probe:
            average.wait = min(2 * average.wait, LONGEST_WAIT)

    def forget(self, req_id: str) -> None:
        """Forget a request that ended."""
        self._averages.pop(req_id, None)
