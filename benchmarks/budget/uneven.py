"""What uneven numbers of drafts could gain: transitions of a step at the same number of drafts in all.

    python -m benchmarks.budget.uneven

Recorded generations are served again and again, so many at once. Each step has K drafts a request on the average, dealt
out evenly, evenly but for requests that the rule takes for hopeless (`draft.acceptance`, where half of what is expected
breaks even), by what the host knows (an average of accepted / expected of each request, as `draft.acceptance` keeps it,
times the expectation of its graph), and by an oracle that knows which drafts will come true.
"""

import random
from collections.abc import Callable, Iterator, Sequence

from benchmarks.budget.recorded import MAX_DRAFTS, Recording, recordings
from benchmarks.budget.simulate import RecordedRequest
from vllm_dllm.draft.acceptance import FIRST_WAIT, RATE, SLACK

NUM_STEPS = 4000
BREAK_EVEN = 0.5
MIXES = {
    "LLaDA static": ("LLaDA static",),
    "LLaDA static, threshold": ("LLaDA static", "LLaDA threshold"),
    "LLaDA static, one of four never accepts": ("LLaDA static", "LLaDA static", "LLaDA static", "!LLaDA static"),
    "LLaDA static, every other never accepts": ("LLaDA static", "!LLaDA static"),
    "SDAR static": ("SDAR static",),
    "SDAR static, dynamic": ("SDAR static", "SDAR dynamic"),
}
BUDGETS = (1, 2, 4)
Deal = Callable[[Sequence["Served"], int], list[int]]


class Served:
    """A place of the batch: recorded requests one after another, and the average of the present one."""

    def __init__(self, names: Iterator[str], known: dict[str, Recording], rng: random.Random) -> None:
        self._names, self._known, self._rng = names, known, rng
        self._begin()

    def _begin(self) -> None:
        name = next(self._names)
        recording = self._known[name.removeprefix("!")]
        self.request = RecordedRequest(self._rng.choice(recording.prompts), name.startswith("!"))
        self.ratio, self.num_without, self.prior = 1.0, 0, recording.prior

    def step(self, num_drafts: int) -> int:
        """Take a step and return how many transitions its drafts saved."""
        saved, had_drafts = self.request.saved(num_drafts), self.request.anchor >= 0 and num_drafts > 0
        if had_drafts:
            self.ratio += RATE * (saved / self.prior[num_drafts] - self.ratio)
        self.num_without = 0 if had_drafts else self.num_without + 1
        self.request.go_on(1 + saved)
        if self.request.is_done:
            self._begin()
        return saved


def greedy(gains: Sequence[Sequence[float]], total: int) -> list[int]:
    """Deal out drafts by marginal gain, which is optimal where gains decrease; of equal gains the first is taken.

    Args:
        gains: of each request, by number of drafts from 0 on.
        total: drafts.
    """
    dealt = [0] * len(gains)
    for _ in range(total):
        open_ = [i for i, own in enumerate(gains) if dealt[i] + 1 < len(own)]
        if not open_:
            break
        best = max(open_, key=lambda i: (gains[i][dealt[i] + 1] - gains[i][dealt[i]], -dealt[i], -i))
        dealt[best] += 1
    return dealt


def evenly(drafting: Sequence[Served], total: int) -> list[int]:
    """Give all equally many, the first ones one more where they do not divide."""
    each, rest = divmod(total, len(drafting))
    return [min(each + (place < rest), MAX_DRAFTS) for place in range(len(drafting))]


def as_now(drafting: Sequence[Served], total: int) -> list[int]:
    """Give none to those whose drafts do not pay, what is theirs to the others, and rare probes."""
    pays = [each.ratio >= SLACK * BREAK_EVEN or each.num_without >= FIRST_WAIT for each in drafting]
    worth = [each for each, pay in zip(drafting, pays, strict=True) if pay] or list(drafting)
    dealt = iter(evenly(worth, total))
    return [next(dealt) if each in worth else 0 for each in drafting]


def by_averages(drafting: Sequence[Served], total: int) -> list[int]:
    """Deal out by what the host knows; who had none for some steps is probed by one."""
    gains = [
        [value * served.ratio + (place > 0) * (served.num_without >= FIRST_WAIT) for place, value in enumerate(prior)]
        for served in drafting
        for prior in [served.prior]
    ]
    return greedy(gains, total)


def by_oracle(drafting: Sequence[Served], total: int) -> list[int]:
    """Deal out so that most drafts come true: best is what saves most steps a draft, each whole need at once."""
    dealt, left = [0] * len(drafting), total
    while True:
        offers = [
            ((served.request.saved(more) - served.request.saved(dealt[i])) / (more - dealt[i]), dealt[i] - more, i)
            for i, served in enumerate(drafting)
            for more in range(dealt[i] + 1, min(MAX_DRAFTS, dealt[i] + left) + 1)
        ]
        best = max(offers, default=(0.0, 0, 0))
        if best[0] <= 0:
            return dealt
        dealt[best[2]] -= best[1]
        left += best[1]


DEALS: dict[str, Deal] = {"even": evenly, "as now": as_now, "by averages": by_averages, "oracle": by_oracle}


def transitions(
    names: Sequence[str], known: dict[str, Recording], at_once: int, budget: int, deal: Deal, num_steps: int = NUM_STEPS
) -> float:
    """Return the transitions of a request and step, on the average.

    Args:
        names: of the recordings, in turn.
        known: the recordings.
        at_once: requests.
        budget: drafts of a step for each request that may have any.
        deal: how they are dealt out.
        num_steps: as many are simulated.
    """
    rng, number = random.Random(0), iter(range(10**9))
    turns = (names[i % len(names)] for i in number)
    batch = [Served(turns, known, rng) for _ in range(at_once)]
    saved = 0
    for _ in range(num_steps):
        drafting = [served for served in batch if served.request.anchor >= 0]
        dealt = deal(drafting, budget * len(drafting)) if drafting else []
        own = dict(zip(map(id, drafting), dealt, strict=True))
        saved += sum(served.step(own.get(id(served), 0)) for served in batch)
    return 1 + saved / (num_steps * at_once)


def main() -> None:
    """Print the table."""
    known = recordings()
    header = ["requests of", "at once", "drafts of each", *DEALS]
    print("| " + " | ".join(header) + " |\n" + "|---" * len(header) + "|")
    for name, names in MIXES.items():
        for at_once in (4, 8):
            for budget in BUDGETS:
                even, *others = (transitions(names, known, at_once, budget, deal) for deal in DEALS.values())
                cells = " | ".join(f"{other / even:.3f}" for other in others)
                print(f"| {name} | {at_once} | {budget} | {even:.3f} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
