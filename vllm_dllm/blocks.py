"""Where the blocks of a request lie in its sequence. Nothing here imports vLLM or torch."""

from dataclasses import dataclass

from vllm_dllm.config import DllmConfig


@dataclass(frozen=True, slots=True)
class RowBlocks:
    """The blocks that a request's sequence is decoded in, one after another.

    Attributes:
        begin: first position of the first one; the prompt's partial block begins here, where there is one.
        end: behind the last one, where the sequence ends.
        block_length: positions of each; the last one may have fewer.
    """

    begin: int
    end: int
    block_length: int

    def __len__(self) -> int:
        """Return the number of blocks."""
        return -(-(self.end - self.begin) // self.block_length)


def row_blocks(
    prompt_len: int, max_tokens: int, settings: DllmConfig, max_model_len: int, *, is_exact: bool = False
) -> RowBlocks:
    """Return the blocks of a request; none for a prompt that leaves no room for one.

    As many as `max_tokens` needs and `max_model_len` has room for. A bidirectional model's begin behind the prompt; it
    attends to every masked position of the sequence, whose length is part of what it sees. Under `block_causal` they
    begin at multiples of their length, and behind each there is room for another; so there is under `causal`, where
    they begin behind the prompt and the last one ends with the reply, since its positions see each other.
    With `is_exact` a bidirectional model's last block ends with `max_tokens`, too, since nothing lies behind it.
    Self-speculation has none: its sequences are as long as an autoregressive model's. So are those of windows, which
    reach beyond `max_tokens`, to the end of `max_model_len`.
    """
    block_length, is_causal = settings.block_length, settings.is_block_causal
    if settings.has_windows:
        return RowBlocks(prompt_len, max(prompt_len, max_model_len), block_length)
    if settings.mode == "self_speculation":
        return RowBlocks(prompt_len, min(prompt_len + max_tokens, max(prompt_len, max_model_len)), block_length)
    begin = prompt_len - prompt_len % block_length if settings.is_aligned else prompt_len
    wanted = -(-(prompt_len + max_tokens - begin) // block_length)
    fitting = (max_model_len - begin) // block_length - is_causal
    if prompt_len > max_prompt_len(settings, max_model_len):
        fitting = 0
    end = begin + min(wanted, fitting) * block_length
    is_exact |= settings.kv_policy == "causal"
    return RowBlocks(begin, min(end, prompt_len + max_tokens) if is_exact else end, block_length)


def max_prompt_len(settings: DllmConfig, max_model_len: int) -> int:
    """Return the length of the longest prompt that leaves room for what its first step has in flight.

    That is a block. Where stored K/V never change it is two, counted from the known tokens as vLLM counts: with the
    first step of a block the rows of the block before it are in flight, and with async scheduling any step has as many.
    With self-speculation, and with windows, it is a token.
    """
    if settings.mode == "self_speculation" or settings.has_windows:
        return max_model_len - 1
    return max_model_len - settings.block_length * (1 + settings.is_block_causal)
