"""How many rows a step may have, and what vLLM sizes by it: its token budget, its buffers and its CUDA graphs."""

from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.config.diffusion import DiffusionConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_dllm.config import DllmConfig
from vllm_dllm.engine.mode import check_self_speculation
from vllm_dllm.engine.sliding_rules import check_windows
from vllm_dllm.errors import ConfigError
from vllm_dllm.spiffy_config import SpiffySettings

logger = init_logger("vllm.dllm")

SCHEDULER = "vllm_dllm.engine.scheduler.DllmScheduler"
ASYNC_SCHEDULERS = {
    True: "vllm_dllm.engine.async_scheduler.CausalAsyncScheduler",
    False: "vllm_dllm.engine.async_scheduler.BidirectionalAsyncScheduler",
}
"""By whether a model is block-causal."""
WINDOW_SCHEDULER = "vllm_dllm.engine.window_scheduler.WindowScheduler"
SLIDING_SCHEDULER = "vllm_dllm.engine.window_scheduler.SlidingScheduler"

MAX_DRAFT_ROWS = 2048
"""Rows of a step beyond which a forward is bound by arithmetic on any device, so that drafts only cost."""


def set_step_sizes(vllm_config: VllmConfig, settings: DllmConfig, spiffy: SpiffySettings | None) -> None:
    """Set the most rows of a request, the token budget and the CUDA graphs.

    Raises: ConfigError for capture sizes that no step has, and for what self-speculation and windows cannot do.
    """
    check_self_speculation(vllm_config, settings)
    check_windows(vllm_config, settings)
    block_length = settings.block_length
    is_causal = settings.is_block_causal
    canvas_length = _canvas_length(settings, spiffy)
    vllm_config.model_config.hf_config.canvas_length = canvas_length
    vllm_config.diffusion_config = DiffusionConfig(canvas_length=canvas_length)
    has_long_drafts = settings.has_windows and spiffy is not None
    num_rows = _step_rows(block_length, vllm_config.scheduler_config.max_num_seqs, spiffy, 1 + has_long_drafts)
    if is_causal:  # a request may store as much as a step emits
        num_stored = canvas_length if settings.has_windows else block_length
        num_rows = max(num_rows, (num_stored + block_length) * vllm_config.scheduler_config.max_num_seqs)
    num_sequences = 1 + (settings.cfg_scale is not None)
    _set_scheduler(vllm_config, num_rows, num_sequences, is_causal=is_causal)
    if settings.mode == "self_speculation" or settings.has_windows:
        vllm_config.scheduler_config.scheduler_cls = SLIDING_SCHEDULER if settings.has_windows else WINDOW_SCHEDULER
        vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
        what = "windows slide by any number of tokens" if settings.has_windows else "windows differ in length"
        logger.info("%s, so that steps run without CUDA graphs", what)
        return
    _set_cuda_graphs(vllm_config, block_length, num_rows, is_uniform=spiffy is None and not is_causal)


def _canvas_length(settings: DllmConfig, spiffy: SpiffySettings | None) -> int:
    """Return what vLLM counts of a request at most: the positions of its block, and one more for each draft.

    That is how the worker learns how many drafts it may have. Of a window that slides it is as many as a step may emit,
    with drafts two windows.
    """
    if settings.has_windows:
        return settings.block_length * (1 + (spiffy is not None and spiffy.max_nodes > 0))
    return settings.block_length + (spiffy.max_nodes if spiffy else 0)


def set_page_size(vllm_config: VllmConfig, block_length: int) -> None:
    """Let pages hold whole blocks where they are cached: a prefill begins behind the pages that a request finds.

    Raises: ConfigError for a page size that the user chose and that cuts blocks.
    """
    cache = vllm_config.cache_config
    if not cache.enable_prefix_caching or cache.block_size % block_length == 0:
        return
    if cache.user_specified_block_size:
        raise ConfigError(
            f"block_size is {cache.block_size}, but prefix caching needs pages of whole blocks of block_length "
            f"{block_length}; allowed are its multiples; give one with --block-size or turn off prefix caching"
        )
    cache.block_size = -(-cache.block_size // block_length) * block_length
    cache.user_specified_block_size = True


def _step_rows(block_length: int, max_num_seqs: int, spiffy: SpiffySettings | None, blocks_of_draft: int) -> int:
    """Return how many rows a step has at most, of blocks that are denoised, with drafts of so many blocks each.

    The scheduler trims the budget, fixed or not, to what fits, so that more than `MAX_DRAFT_ROWS` are there only for
    requests without drafts, or for all drafts of a single one.
    """
    roots = max_num_seqs * block_length
    if spiffy is None:
        return roots
    most = block_length * (1 + blocks_of_draft * spiffy.max_nodes)
    num_rows = max(roots, min(max_num_seqs * most, max(most, MAX_DRAFT_ROWS)))
    if spiffy.budget is not None and num_rows < max_num_seqs * most:
        logger.info(
            "Spiffy: budget %d is for up to %d requests at a time; with more, up to max_num_seqs=%d, a step has fewer "
            "drafts: it has at most %d rows",
            spiffy.budget,
            num_rows // most,
            max_num_seqs,
            num_rows,
        )
    return num_rows


def _set_scheduler(vllm_config: VllmConfig, num_rows: int, num_sequences: int, *, is_causal: bool) -> None:
    """Make the token budget large enough for the rows of every running request and the longest prompt in one step.

    A refresh may be as long as `max_model_len`, and with guidance there are two at a time.
    """
    scheduler = vllm_config.scheduler_config
    if scheduler.async_scheduling and current_platform.is_cpu():
        logger.info("async_scheduling: vLLM has none on a CPU, steps are scheduled one after the other")
    elif scheduler.async_scheduling:
        but = "and waits for it to know where its blocks begin" if is_causal else "unless that is likely to end a block"
        logger.info("async_scheduling: a step is scheduled while the one before runs, %s", but)
    scheduler.async_scheduling = bool(scheduler.async_scheduling) and not current_platform.is_cpu()
    scheduler.scheduler_cls = ASYNC_SCHEDULERS[is_causal] if scheduler.async_scheduling else SCHEDULER
    needed = num_rows + vllm_config.model_config.max_model_len * num_sequences
    if scheduler.max_num_batched_tokens < needed:
        logger.info(
            "Raising max_num_batched_tokens from %d to %d: %d rows for max_num_seqs=%d, and max_model_len",
            scheduler.max_num_batched_tokens,
            needed,
            num_rows,
            scheduler.max_num_seqs,
        )
        scheduler.max_num_batched_tokens = needed


def _set_cuda_graphs(vllm_config: VllmConfig, block_length: int, num_rows: int, *, is_uniform: bool) -> None:
    """Capture denoising steps whole: their shape is the number of blocks in them times the block length.

    Where steps are uniform that is one block per request. With drafts, or blocks to commit, each step has its own
    number of blocks per request, and vLLM's CUDA graphs of decoding steps know one number only: `FULL` captures by the
    number of rows, whoever they belong to. Steps that refresh or prefill differ in shape and run eagerly; nothing is
    compiled.
    """
    compilation = vllm_config.compilation_config
    if vllm_config.model_config.enforce_eager or compilation.cudagraph_mode == CUDAGraphMode.NONE:
        return
    compilation.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY if is_uniform else CUDAGraphMode.FULL
    if compilation.cudagraph_capture_sizes is None:
        most = num_rows // block_length
        compilation.cudagraph_capture_sizes = [n * block_length for n in captured_blocks(most)]
        compilation.max_cudagraph_capture_size = most * block_length
    elif any(size % block_length for size in compilation.cudagraph_capture_sizes):
        raise ConfigError(
            f"cudagraph_capture_sizes are {compilation.cudagraph_capture_sizes}, but a step has block_length "
            f"{block_length} rows for each block in it; give multiples of it"
        )
    elif max(compilation.cudagraph_capture_sizes, default=0) >= vllm_config.scheduler_config.max_num_batched_tokens:
        # A step that refreshes counts as larger than any captured one, and has to fit, too.
        raise ConfigError(
            f"cudagraph_capture_sizes are {compilation.cudagraph_capture_sizes}, but max_num_batched_tokens is "
            f"{vllm_config.scheduler_config.max_num_batched_tokens}; give sizes below it"
        )


def captured_blocks(most: int) -> list[int]:
    """Return the numbers of blocks to capture, up to `most`: each up to 16, every 2nd to 32, every 4th to 64, ...

    A step computes the rows that pad it. Where a step of some drafts begins to cost more than one without, at 4 to 16
    blocks, none does; above, at most one row in 9.
    """
    blocks = list(range(1, 17))
    while blocks[-1] < most:
        last = blocks[-1]
        blocks += range(last + last // 8, 2 * last + 1, last // 8)
    return [n for n in blocks if n < most] + [most]
