"""The check of state: what the worker says it did must add up to what the scheduler believes (docs/operate.md).

`VLLM_DLLM_CHECK=idle` keeps an account of every request and compares it with each report, and all that may be left when
the engine goes idle. `VLLM_DLLM_CHECK=1` also compares slots, pages and canvases after every step. A disagreement is a
StateError that names the request.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from vllm_dllm.engine.pages import DllmPages
from vllm_dllm.engine.report import RequestReport
from vllm_dllm.engine.rows import StepRows
from vllm_dllm.engine.telemetry import RequestTotals
from vllm_dllm.engine.worker_check import Fault
from vllm_dllm.errors import StateError
from vllm_dllm.state.report import FAILED


@dataclass(slots=True)
class Account:
    """What the reports of a request come to.

    Attributes:
        stored: positions whose K/V are stored, those of the prefix cache among them; of a block-causal model.
        unmasked: positions, since the request was given a slot.
        emitted: tokens of finished blocks, since then.
        start: where the block of the last step begins, in the scheduler.
        is_over: whether the last step reached the answer's end before its block's, so that the request has to end.
        begins: whether its next step is the first one of a block.
        totals: over all its preemptions.
    """

    stored: int = 0
    unmasked: int = 0
    emitted: int = 0
    start: int = 0
    begins: bool = True
    is_over: bool = False
    totals: RequestTotals = field(default_factory=RequestTotals)


class StateCheck:
    """The scheduler's part.

    Args:
        rows, pages: of the scheduler's requests.
    """

    def __init__(self, rows: StepRows, pages: DllmPages) -> None:
        self._rows, self._pages = rows, pages
        self._accounts: dict[str, Account] = {}

    def admit(self, request_id: str, num_hit: int) -> None:
        """Begin an account, or begin it anew after a preemption.

        Args:
            request_id: of a request that was given a slot.
            num_hit: positions that it found in the prefix cache.
        """
        totals = self._accounts[request_id].totals if request_id in self._accounts else RequestTotals()
        self._accounts[request_id] = Account(stored=num_hit, totals=totals)

    def resume(self, request_id: str, num_known: int) -> None:
        """Note how many positions are known in the canvas that a request was given a slot with."""
        self._accounts[request_id].unmasked = num_known

    def free(self, request_id: str) -> None:
        """End an account."""
        self._accounts.pop(request_id, None)

    def account(
        self, requests: Mapping[str, Request], reports: Mapping[str, RequestReport], output: ModelRunnerOutput
    ) -> None:
        """Enter a step into the accounts of its requests, but for those aborted meanwhile. Raises: StateError."""
        for req_id in reports.keys() & requests.keys():
            emitted = output.sampled_token_ids[output.req_id_to_index[req_id]]
            self.take(requests[req_id], reports[req_id], len(emitted))

    def take(self, request: Request, report: RequestReport, num_emitted: int) -> None:
        """Enter a step into a request's account, before vLLM counts the step's tokens.

        Args:
            request: that took a denoising step; of one that was preempted since, nothing is left but its totals.
            report: of the step.
            num_emitted: tokens that the worker emitted.

        Raises: StateError.
        """
        account = self._accounts.get(request.request_id)
        if account is None:
            raise StateError(f"request {request.request_id} took a step, but was never given a slot")
        account.totals.add(report)
        if request.num_stale_output_tokens:
            return
        self._check_positions(request, report, account)
        account.unmasked += report.unmasked + report.left
        pins = self._rows.kv.pins.get(request.request_id)
        account.emitted += num_emitted - (pins.count(request.num_tokens, num_emitted) if pins else 0)
        account.begins, account.is_over = bool(report.finished), bool(report.left)
        self._check_numbers(request.request_id, report, account, num_emitted)
        if report.pages is not None:
            self._check_pages(request, report, report.pages)

    def _check_positions(self, request: Request, report: RequestReport, account: Account) -> None:
        name = request.request_id
        num_tokens = request.num_tokens
        start = account.start = int(self._rows.kv.block_start(np.array(num_tokens)))
        if report.stored not in self._rows.kv.stored_behind(start):
            raise StateError(
                f"request {name}: its block begins at {start} in the scheduler, which has {num_tokens} tokens of it, "
                f"but the worker is at {report.stored}"
            )
        if self._rows.is_causal:
            account.stored += report.wrote
            if account.stored != report.stored:
                raise StateError(
                    f"request {name}: its steps stored K/V of {account.stored} positions in all, with those found in "
                    f"the prefix cache, but {report.stored} lie before its block"
                )
            return
        end = self._rows.seq_end(request)
        pins = self._rows.kv.pins.get(name)
        is_given = pins is not None and not pins.num_masked(start, self._rows.block_length)
        allowed = self._rows.kv.may_store(start, end, request.num_prompt_tokens, begins_block=account.begins)
        if is_given and account.begins:
            allowed = (0,)
        if report.wrote not in allowed:
            raise StateError(
                f"request {name}: a step stored K/V of {report.wrote} positions, but the scheduler has a row of {end} "
                f"with a block {'that begins ' if account.begins else ''}at {start}; allowed are "
                f"{', '.join(map(str, allowed))}"
            )

    def _check_numbers(self, name: str, report: RequestReport, account: Account, num_emitted: int) -> None:
        if bool(num_emitted) != bool(report.finished):
            raise StateError(f"request {name}: {num_emitted} tokens came with a report of {report.finished} blocks")
        ahead = account.unmasked - account.emitted
        most = 0 if report.finished and not self._rows.is_causal else self._rows.block_length
        if not 0 <= ahead <= most:
            raise StateError(
                f"request {name}: {account.unmasked} positions were unmasked and {account.emitted} tokens emitted"
            )
        if report.accepted > sum(report.proposed) or not 0 <= report.forwards <= 1:
            raise StateError(
                f"request {name}: {report.accepted} of {sum(report.proposed)} drafts came true in {report.forwards} "
                "forwards"
            )
        # A look-ahead that came true may have filled the next block at once.
        came_over = self._rows.is_causal and report.finished and report.stored > account.start
        fault = Fault(report.faults & ~FAILED) & ~(Fault.NO_MASK if came_over else Fault(0))
        if fault:
            faults = ", ".join(str(each.name) for each in fault)
            raise StateError(f"request {name}: the worker has a canvas that cannot be: {faults}")

    def _check_pages(self, request: Request, report: RequestReport, pages: Sequence[int]) -> None:
        name, own = request.request_id, [page.block_id for page in self._pages.owners.get(request.request_id, ())]
        if list(pages) != own[: len(pages)]:
            raise StateError(f"request {name} has the pages {list(pages)} in the worker, {own} in the scheduler")
        end = report.stored if self._rows.is_causal else self._rows.seq_end(request)
        if len(pages) * self._pages.page_size < end:
            raise StateError(
                f"request {name} has {len(pages)} pages of {self._pages.page_size} in the worker, but K/V of {end} "
                "positions"
            )

    def compare_totals(self, totals: Mapping[str, RequestTotals]) -> None:
        """Compare what requests are told they took, and see that those ended of which an end was found.

        Raises: StateError.
        """
        for name, account in self._accounts.items():
            if account.is_over:
                raise StateError(
                    f"request {name} goes on, but the worker found its end and left the block masked there"
                )
            if name in totals and totals[name] != account.totals:
                raise StateError(f"request {name} is told {totals[name]}, but its reports come to {account.totals}")

    def compare_pages(self, running: Iterable[Request]) -> None:
        """See that no page is two requests', but for what is cached for both. Raises: StateError."""
        owners: dict[int, str] = {}
        for request in running:
            for index, page in enumerate(self._pages.owners.get(request.request_id, ())):
                owner = owners.setdefault(page.block_id, request.request_id)
                stored = self._accounts[request.request_id].stored if request.request_id in self._accounts else 0
                is_shared = page.block_hash is not None and (index + 1) * self._pages.page_size <= stored
                if page.is_null or (owner != request.request_id and not is_shared):
                    raise StateError(f"request {request.request_id} has page {page.block_id}, which is {owner}'s")

    def compare_idle(self, left: Mapping[str, Iterable[str]]) -> None:
        """See that nothing is left when there are no requests.

        Args:
            left: requests by what still knows of them.

        Raises: StateError.
        """
        for where, names in {**left, "the accounts": self._accounts}.items():
            for name in names:
                raise StateError(f"request {name} is gone, but {where} still know of it")
