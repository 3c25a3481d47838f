"""vLLM's scheduler with the one thing block diffusion asks of it."""

from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from vllm_dllm.config import generation_length
from vllm_dllm.engine.config_hook import settings_of


class DllmScheduler(Scheduler):
    """Reserves the pages of a request's whole generation.

    A bidirectional model stores K/V for the masked positions of the whole generation, so a request takes all its
    pages when it is admitted and never needs another. What is left of the token budget and of `max_model_len` is
    always enough for whole blocks, so that a running request is never cut.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._block_length = settings_of(self.vllm_config).block_length
        self._allocate_slots = self.kv_cache_manager.allocate_slots
        self.kv_cache_manager.allocate_slots = self._allocate_row

    def _allocate_row(self, request: Request, num_new_tokens: int, *args: Any, **kwargs: Any) -> KVCacheBlocks | None:
        """Call `KVCacheManager.allocate_slots` with the rest of the generation as its look-ahead."""
        row_len = request.num_prompt_tokens + self._generation_length(request)
        kwargs["num_lookahead_tokens"] = max(0, row_len - request.num_computed_tokens - num_new_tokens)
        return self._allocate_slots(request, num_new_tokens, *args, **kwargs)

    def _generation_length(self, request: Request) -> int:
        return generation_length(request.num_prompt_tokens, request.max_tokens, self._block_length, self.max_model_len)
