"""Who of a bidirectional model takes a step while the one before is under way, and which of these steps were void."""

from collections import deque
from dataclasses import dataclass

from vllm.v1.request import Request

from vllm_dllm.config import DllmConfig
from vllm_dllm.engine.pins import pins_of
from vllm_dllm.engine.report import RequestReport
from vllm_dllm.engine.request import resolve_params
from vllm_dllm.state.pins import Pins
from vllm_dllm.unmask.policy import POLICY_IDS, SCHEDULED
from vllm_dllm.unmask.schedule import UnmaskRules

_SCHEDULED_IDS = {POLICY_IDS[name] for name in SCHEDULED}


@dataclass(slots=True)
class Progress:
    """A request since it was admitted, as far as it was reported."""

    most: int  # positions that deciding a canvas unmasks
    num_masked: int  # positions of its block
    num_steps: int = 0
    num_unmasked: int = 0
    pins: Pins | None = None
    start: int = 0  # absolute position of its block, where there are pins

    def begin(self, start: int, block_length: int) -> None:
        """Begin a block."""
        self.start = start
        self.num_masked = block_length if self.pins is None else self.pins.num_masked(start, block_length)


@dataclass(slots=True)
class StepUnderWay:
    """A step without a report yet."""

    of: Progress
    most: int  # positions that it unmasks
    is_void: bool = False


class RunAhead:
    """Chooses by what the steps under way will have left of each request's block.

    Behind the step that ends a block comes one that refreshes the whole sequence. A step that was scheduled as another
    one of the block that has ended is void: the workers find so, and leave the next block as it is. That costs a
    forward, and waiting for the report costs the host's time. So a request runs ahead where the steps under way cannot
    end its block, as those of policies whose table says how many positions a step unmasks, or hardly will: where they
    would have to unmask more than twice what its steps did so far.

    Args:
        settings, rules, max_model_len: of the server.
    """

    def __init__(self, settings: DllmConfig, rules: UnmaskRules, max_model_len: int) -> None:
        self._settings, self._rules, self._max_model_len = settings, rules, max_model_len
        self._progress: dict[str, Progress] = {}
        self._under_way: dict[str, deque[StepUnderWay]] = {}

    def may_go_on(self, request: Request) -> bool:
        """Tell whether a request takes a step before the reports of those under way."""
        steps = self._steps(request.request_id)
        return not steps or self._is_certain(steps) or self._is_likely(steps)

    def is_ahead(self, request: Request) -> bool:
        """Tell whether a request has a step of its block under way, so that the next one may find it ended."""
        return bool(self._steps(request.request_id))

    def scheduled(self, request: Request, num_drafts: int) -> None:
        """Take note of a step."""
        name = request.request_id
        if name not in self._progress:
            self._progress[name] = self._begun(request)
        of = self._progress[name]
        self._under_way.setdefault(name, deque()).append(StepUnderWay(of, of.most * (1 + num_drafts)))

    def reported(self, request_id: str, report: RequestReport) -> bool:
        """Take note of the oldest step under way; tell whether it counts: it was not void, nor of a freed request."""
        steps = self._under_way.get(request_id)
        if steps is None:
            return False
        step = steps.popleft()
        if step.is_void:
            return False
        of = step.of
        of.num_steps += 1
        of.num_unmasked += report.unmasked
        of.num_masked -= report.unmasked
        if report.finished:
            of.begin(of.start + self._settings.block_length, self._settings.block_length)
            for behind in steps:
                behind.is_void |= behind.of is of
        return True

    def preempted(self, request_id: str) -> None:
        """Let a request begin anew; of the steps under way reports still come."""
        self._progress.pop(request_id, None)

    def freed(self, request_id: str) -> None:
        """Forget a request, which may be unknown."""
        self._progress.pop(request_id, None)
        self._under_way.pop(request_id, None)

    @property
    def known(self) -> set[str]:
        """Requests of which anything is remembered."""
        return self._progress.keys() | self._under_way.keys()

    def _steps(self, request_id: str) -> list[StepUnderWay]:
        """Return the steps under way of a request's block."""
        of = self._progress.get(request_id)
        return [step for step in self._under_way.get(request_id, ()) if step.of is of and not step.is_void]

    def _is_certain(self, steps: list[StepUnderWay]) -> bool:
        return sum(step.most for step in steps) < steps[0].of.num_masked

    def _is_likely(self, steps: list[StepUnderWay]) -> bool:
        of = steps[0].of
        return 0 < 2 * of.num_unmasked * len(steps) < of.num_masked * of.num_steps

    def _begun(self, request: Request) -> Progress:
        pins = pins_of(request.sampling_params, request.num_prompt_tokens)
        begun = Progress(self._most(request), 0, pins=pins)
        begun.begin(0 if pins is None else request.num_tokens, self._settings.block_length)
        return begun

    def _most(self, request: Request) -> int:
        assert request.sampling_params is not None, "check_admission refuses requests without"
        params = resolve_params(
            request.sampling_params,
            request_id=request.request_id,
            prompt_len=request.num_prompt_tokens,
            settings=self._settings,
            rules=self._rules,
            max_model_len=self._max_model_len,
        )
        is_scheduled = params.own_policy is None and params.policy_id in _SCHEDULED_IDS
        return max(params.counts) if is_scheduled else self._settings.block_length
