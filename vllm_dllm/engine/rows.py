"""How many rows of a forward the requests of a step need, as the scheduler counts them before the step."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from vllm.v1.request import Request

from vllm_dllm.blocks import row_blocks
from vllm_dllm.config import DllmConfig
from vllm_dllm.state.kv import refreshed


class StepRows:
    """What each request has of a step's rows, and what is left of them; what a request needs, without drafts.

    The worker makes the step's plan from the same rules (`state.kv`, `engine.plan`).

    Args:
        settings: of the server.
        max_model_len: positions of a request.
        max_rows: of a step.
    """

    def __init__(self, settings: DllmConfig, max_model_len: int, max_rows: int) -> None:
        self.settings = settings
        self.block_length = settings.block_length
        self.is_causal = settings.is_block_causal
        self.max_model_len = max_model_len
        self.max_rows = max_rows
        self.stored: dict[str, int] = {}  # of running requests of a block-causal model: positions with K/V
        # Of running requests of a bidirectional model: where their block begins, and the number of its last step.
        self._block: dict[str, tuple[int, int]] = {}
        self._row_ends: dict[str, int] = {}
        self.given: dict[str, int] = {}
        self._long: set[str] = set()  # who refreshes or prefills
        self.free = 0

    def begin_step(self) -> None:
        """Take all rows back."""
        self.given, self._long, self.free = {}, set(), self.max_rows

    def give(self, request: Request, num_rows: int, *, is_first: bool = False) -> bool:
        """Let a request have rows, if so many are left; tells whether it has them.

        Args:
            request: that may have some already.
            num_rows: how many more.
            is_first: whether the step admits it.
        """
        if num_rows > self.free:
            return False
        self.free -= num_rows
        before = self.given.setdefault(request.request_id, 0)
        self.given[request.request_id] += num_rows
        if is_first or (before == 0 and not self.is_causal and num_rows > self.block_length):
            self._long.add(request.request_id)
        return True

    def total(self, scheduled: Mapping[str, int], largest_graph: int) -> int:
        """Return how many rows those have whom vLLM scheduled, as it is told; never fewer than it counts tokens.

        Args:
            scheduled: tokens that it counts, by request.
            largest_graph: rows of the largest captured graph. None has the shape of a step that refreshes or prefills,
                so such a step counts as larger.

        Raises: RuntimeError for more rows than a step may have.
        """
        total = max(sum(self.given[req_id] for req_id in scheduled), sum(scheduled.values()))
        if not self._long.isdisjoint(scheduled):
            total = max(total, largest_graph + 1)
        if total > self.max_rows:
            raise RuntimeError(f"a step has {total} rows, max_num_batched_tokens is {self.max_rows}")
        return total

    def needed(self, requests: Sequence[Request]) -> tuple[list[int], list[bool]]:
        """Return how many rows running requests need, and which have no drafts, since they begin a block."""
        if self.is_causal:
            commits = [self.commits(request) for request in requests]
            return [self.block_length * (1 + commit) for commit in commits], commits
        start = np.array([request.num_computed_tokens for request in requests], dtype=np.int64)
        blocks = [self._block.get(request.request_id, (-1, -1)) for request in requests]
        before, step = np.array(blocks, dtype=np.int64).reshape(-1, 2).T
        begins = before != start
        begin, end = refreshed(
            self.settings.kv_policy,
            self.settings.refresh_every,
            self.block_length,
            begins,
            np.where(begins, 0, step + 1),
            start,
            np.array([self.row_end(request) for request in requests], dtype=np.int64),
        )
        return np.maximum(end - begin, self.block_length).tolist(), begins.tolist()

    def first(self, request: Request, num_hit: int) -> int:
        """Return the rows of the step that admits a request: of its prompt, behind a cache hit, and of its block."""
        if not self.is_causal:
            return self.row_end(request)
        return request.num_tokens - num_hit + self.block_length  # of a partial block vLLM counts the known tokens twice

    def commits(self, request: Request) -> bool:
        """Tell whether a request's next step stores a block that it emitted."""
        stored = self.stored.get(request.request_id)
        return stored is not None and request.num_computed_tokens >= stored + self.block_length

    def row_end(self, request: Request) -> int:
        """Return where the row of a bidirectional request ends."""
        end = self._row_ends.get(request.request_id)
        if end is None:
            end = row_blocks(request.num_prompt_tokens, request.max_tokens, self.settings, self.max_model_len).end
            self._row_ends[request.request_id] = end
        return end

    def note(self, requests: Iterable[Request]) -> None:
        """Take note of the requests of a step; one without a block was just admitted, and has its block now."""
        if self.is_causal:
            return
        for request in requests:
            before, step = self._block.get(request.request_id, (-1, 0))
            start = request.num_tokens if before < 0 else request.num_computed_tokens
            self._block[request.request_id] = start, step + 1 if start == before else 0

    @property
    def known(self) -> set[str]:
        """Requests of which anything is remembered."""
        return {*self.stored, *self._block, *self._row_ends}

    def forget(self, request: Request) -> None:
        """Forget what a preempted or freed request has stored."""
        self.stored.pop(request.request_id, None)
        self._block.pop(request.request_id, None)
        self._row_ends.pop(request.request_id, None)
