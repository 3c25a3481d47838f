"""Metrics and the log line of diffusion models, beside vLLM's own and under the same conditions (docs/metrics.md)."""

import logging
from collections.abc import Callable
from typing import Any

from prometheus_client import Counter, Histogram
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.metrics.loggers import AggregateStatLoggerBase, StatLoggerManager
from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats

from vllm_dllm.engine import stats_way
from vllm_dllm.engine.configs import exactness_of, is_ours, settings_of
from vllm_dllm.engine.patches import wrap
from vllm_dllm.engine.telemetry import StepStats

logger = init_logger("vllm.dllm")

LABELS = ["model_name", "engine"]
TOKENS_PER_FORWARD = (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32)
COUNTERS = {
    "forwards": "Denoising forwards, counted once for each request in them.",
    "refreshes": "Refreshes of a request's K/V.",
    "unmasked": "Positions unmasked.",
    "blocks": "Blocks emitted.",
    "left_masked": "Positions of emitted blocks that stayed masked, behind the end of their answer.",
    "held": "Requests that waited for the next step, since not all rows fitted.",
}
DRAFT_COUNTERS = {
    "draft_nodes_proposed": ("depth", "Drafts evaluated, by depth."),
    "draft_nodes_accepted": ("steps_ahead", "Drafts that were accepted, by the steps that they were ahead."),
    "steps": ("budget", "Engine steps, by the drafts that each request had."),
}


class DllmStatLogger(AggregateStatLoggerBase):
    """Exports `vllm:dllm_*`, and logs a line per interval where vLLM logs its own.

    vLLM removes all `vllm:*` from the registry before it registers its own metrics, so that engines may follow each
    other in a process; ours are made after that.
    """

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int], *, is_logging: bool = True) -> None:
        self._is_logging = is_logging
        exactness = exactness_of(vllm_config)
        is_self_speculative = settings_of(vllm_config).mode == "self_speculation"
        self._drafting = None if exactness is None else "Self-speculation" if is_self_speculative else "Spiffy"
        self._interval = StepStats()
        labels = {index: [vllm_config.model_config.served_model_name, str(index)] for index in engine_indexes}
        histogram = Histogram(
            "vllm:dllm_tokens_per_forward",
            "Positions unmasked per forward of a request, refreshes included; mean of each step.",
            LABELS,
            buckets=TOKENS_PER_FORWARD,
        )
        self._tokens_per_forward = {index: histogram.labels(*values) for index, values in labels.items()}
        counters = {name: Counter(f"vllm:dllm_{name}", text, LABELS) for name, text in COUNTERS.items()}
        self._counters = {
            index: {name: counter.labels(*values) for name, counter in counters.items()}
            for index, values in labels.items()
        }
        self._draft_counters: dict[str, Counter] = {}
        self._draft_children: dict[tuple[str, int, int], Counter] = {}  # those with labels, whose making takes time
        if exactness is not None:
            self._draft_counters = {
                name: Counter(f"vllm:dllm_{name}", text, [*LABELS, "exactness", label])
                for name, (label, text) in DRAFT_COUNTERS.items()
            }
            self._draft_labels = {index: [*values, exactness] for index, values in labels.items()}

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: MultiModalCacheStats | None = None,
        engine_idx: int = 0,
    ) -> None:
        """Count what one step of an engine did."""
        stats = stats_way.take(scheduler_stats)
        if stats is None:
            return
        self._interval.add(stats)
        for name, counter in self._counters[engine_idx].items():
            counter.inc(getattr(stats, name))
        if stats.nfe:
            self._tokens_per_forward[engine_idx].observe(stats.unmasked / stats.nfe)
        if self._drafting:
            self._count_by("draft_nodes_proposed", engine_idx, dict(enumerate(stats.proposed, 1)))
            self._count_by("draft_nodes_accepted", engine_idx, dict(enumerate(stats.accepted, 1)))
            self._count_by("steps", engine_idx, stats.budgets)

    def _count_by(self, name: str, engine_idx: int, counts: dict[int, int]) -> None:
        for value, count in counts.items():
            if count:
                key = name, engine_idx, value
                if key not in self._draft_children:
                    labels = *self._draft_labels[engine_idx], str(value)
                    self._draft_children[key] = self._draft_counters[name].labels(*labels)
                self._draft_children[key].inc(count)

    def log(self) -> None:
        """Log what happened since the last call, if something did."""
        if self._is_logging and self._interval.forwards:
            logger.info("%s", describe(self._interval, self._drafting))
        self._interval = StepStats()

    def log_engine_initialized(self) -> None:
        """Say nothing: the configuration is logged when it is made."""


def describe(stats: StepStats, drafting: str | None) -> str:
    """Return the log line of an interval that has forwards; `drafting` names who drafts, None: nobody does."""
    parts = [
        f"Tokens/forward: {stats.unmasked / stats.nfe:.2f}",
        f"Forwards: {stats.forwards}",
        f"Refreshes: {stats.refreshes}",
        f"Blocks: {stats.blocks}",
    ]
    if drafting is None:
        return f"Block diffusion metrics: {', '.join(parts)}"
    proposed, accepted = sum(stats.proposed), sum(stats.accepted)
    reached = [count / stats.forwards for count in stats.accepted if count]
    num_steps = sum(stats.budgets.values())
    budget = sum(value * count for value, count in stats.budgets.items()) / num_steps
    parts += [
        f"Mean accepted: {accepted / stats.forwards:.2f}",
        f"Per-depth acceptance: {', '.join(f'{share:.3f}' for share in reached) or 'none'}",
        f"Proposed: {proposed}",
        f"Accepted: {accepted}",
        f"Mean budget: {budget:.1f} (of {min(stats.budgets)} to {max(stats.budgets)})",
    ]
    return f"{drafting} metrics: {', '.join(parts)}"


def add_to_vllm() -> None:
    """Have every front end of one of our models log and export our metrics, where it does vLLM's own.

    vLLM's entry point for such loggers would add ours to any model, and turn logging on where it was turned off.
    """

    def make(original: Callable[..., None]) -> Callable[..., None]:
        def wrapper(
            self: StatLoggerManager,
            vllm_config: VllmConfig,
            *args: Any,
            enable_default_loggers: bool = True,
            client_count: int = 1,
            **kwargs: Any,
        ) -> None:
            kwargs |= {"enable_default_loggers": enable_default_loggers, "client_count": client_count}
            original(self, vllm_config, *args, **kwargs)
            if enable_default_loggers and is_ours(vllm_config.model_config):
                is_logging = client_count == 1 and logger.isEnabledFor(logging.INFO)
                self.stat_loggers.append(DllmStatLogger(vllm_config, self.engine_indexes, is_logging=is_logging))

        return wrapper

    wrap("StatLoggerManager.__init__", make)
