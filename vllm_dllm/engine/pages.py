"""vLLM's KV cache manager where K/V are stored at other times than vLLM counts tokens as computed."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import Request

from vllm_dllm.engine.patches import become


class DllmPages(KVCacheManager):
    """Gives each request pages for the positions that get K/V, and caches a page when told that it is stored.

    A request that may not take the step has no pages for it, which makes vLLM's scheduler admit it later.

    vLLM's scheduler makes the manager, so an instance of vLLM's own class becomes one by `take_over`.
    """

    paged_end: Callable[[Request], int]
    admits: Callable[[Request, int], bool]

    @classmethod
    def take_over(
        cls,
        manager: KVCacheManager,
        paged_end: Callable[[Request], int],
        admits: Callable[[Request, int], bool],
    ) -> "DllmPages":
        """Make a new manager one of this class.

        Args:
            manager: changed.
            paged_end: returns up to where a request has pages.
            admits: tells whether a request, which found so many positions in the prefix cache, may take the step.
        """
        become(manager, cls)
        assert isinstance(manager, cls)
        manager.paged_end, manager.admits = paged_end, admits
        return manager

    @property
    def page_size(self) -> int:
        """Positions per page."""
        size: int = self.coordinator.single_type_managers[0].block_size
        return size

    @property
    def owners(self) -> Mapping[str, Sequence[KVCacheBlock]]:
        """The pages of each request that has any."""
        owners: Mapping[str, Sequence[KVCacheBlock]] = self.coordinator.single_type_managers[0].req_to_blocks
        return owners

    def allocate_slots(
        self, request: Request, num_new_tokens: int, num_new_computed_tokens: int = 0, *args: Any, **kwargs: Any
    ) -> KVCacheBlocks | None:
        """Allocate up to `paged_end`, whatever is scheduled; nothing is cached, as nothing is stored yet."""
        if not self.admits(request, num_new_computed_tokens):
            return None
        end, counted = self.paged_end(request), request.num_computed_tokens
        kwargs |= {"num_lookahead_tokens": 0, "delay_cache_blocks": True}
        # With async scheduling the count is ahead of what is known, and of what will have been stored.
        request.num_computed_tokens = min(counted, end - 1)
        missing = end - request.num_computed_tokens - num_new_computed_tokens
        try:
            return super().allocate_slots(request, missing, num_new_computed_tokens, *args, **kwargs)
        finally:
            request.num_computed_tokens = counted

    def cache_blocks(self, request: Request, num_computed_tokens: int) -> None:
        """Do nothing where vLLM calls it: it does not know what is stored."""

    def cache_stored(self, request: Request, num_stored: int) -> None:
        """Offer the pages whose positions are all stored to other requests."""
        super().cache_blocks(request, num_stored)
