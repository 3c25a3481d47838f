"""What a request may ask of a server: its options against the settings, both read by `config`."""

from vllm_dllm.config import (
    OWN_OPTIONS,
    REQUEST_PREFIX,
    DllmConfig,
    InvalidOptionError,
    RequestOptions,
    is_even,
    no_growth,
)
from vllm_dllm.policy_options import options_of
from vllm_dllm.unmask.registry import file_option, needs_file


def check_horizon(options: RequestOptions, settings: DllmConfig) -> None:
    """Check that a request's sequence may grow under the server's KV policy. Raises: InvalidOptionError."""
    name = f"{REQUEST_PREFIX}horizon"
    if problem := no_growth(name, options.horizon, settings.kv_policy):
        raise InvalidOptionError(problem, name, options.horizon)


def check_policy_options(options: RequestOptions, settings: DllmConfig) -> None:
    """Check that a request gives no option that its policy ignores.

    Raises: InvalidOptionError.
    """
    if options.cfg_scale is not None and settings.cfg_scale is None:
        raise InvalidOptionError(
            f"{REQUEST_PREFIX}cfg_scale is {options.cfg_scale}, but the server has no room for a second sequence of "
            "each request; remove it or start the server with refresh_every 1 and cfg_scale 0",
            REQUEST_PREFIX + "cfg_scale",
            options.cfg_scale,
        )
    policy = options.policy or settings.policy
    check_horizon(options, settings)
    if needs_file(policy) and file_option(policy) not in settings.files:
        raise InvalidOptionError(
            f"{REQUEST_PREFIX}policy is {policy!r}, but the server has no {file_option(policy)}, the net that it looks "
            "at; allowed are others; choose one, or give the server that setting",
            REQUEST_PREFIX + "policy",
            policy,
        )
    exclude = {"policy", "cfg_scale", "horizon", *OWN_OPTIONS} - {"steps"}
    given = options.model_dump(exclude=exclude, exclude_none=True)
    for name, value in given.items():
        if name not in options_of(policy):
            allowed = ", ".join(REQUEST_PREFIX + option for option in options_of(policy)) or "none"
            raise InvalidOptionError(
                f"{REQUEST_PREFIX}{name} is {value!r}, but the request's policy {policy!r} does not use it; allowed is "
                f"{allowed}; remove it or choose another {REQUEST_PREFIX}policy",
                REQUEST_PREFIX + name,
                value,
            )


def request_steps(options: RequestOptions, settings: DllmConfig, max_tokens: int) -> int:
    """Return the steps of each block of a request, 1..block_length.

    `dllm_steps` are split over the blocks that `max_tokens` fill, as LLaDA's `generate` does. Aligned blocks may be one
    more, since the first one begins with the prompt's partial block; it gets as many steps as the others, so that
    what is allowed does not depend on the prompt.

    Args:
        options: of the request.
        settings: of the server.
        max_tokens: what the request generates at most (tokens), no more than `blocks.row_blocks` has room for.

    Raises: InvalidOptionError when they are not a whole number of steps, at most `block_length`, for each block, and
        when the policy is `dynamic` and a block cannot be split evenly over its steps.
    """
    block_length, policy = settings.block_length, options.policy or settings.policy
    name, value = ("policy", policy) if options.steps is None else ("steps", options.steps)
    steps = settings.steps_per_block or block_length
    if options.steps is not None:
        num_blocks = -(-max_tokens // block_length)
        most = num_blocks * block_length
        if options.steps % num_blocks or options.steps > most:
            raise InvalidOptionError(
                f"{REQUEST_PREFIX}steps is {options.steps}, but max_tokens {max_tokens} in {num_blocks} blocks of "
                f"{block_length} need a multiple of {num_blocks} between {num_blocks} and {most}; change "
                f"{REQUEST_PREFIX}steps or max_tokens",
                REQUEST_PREFIX + name,
                value,
            )
        steps = options.steps // num_blocks
    if not is_even(policy, steps, block_length):
        raise InvalidOptionError(
            f"{REQUEST_PREFIX}{name} is {value!r}, which gives {steps} steps to a block of {block_length}, but "
            f"'dynamic' needs steps that divide it; give another {REQUEST_PREFIX}steps or {REQUEST_PREFIX}policy",
            REQUEST_PREFIX + name,
            value,
        )
    return steps
