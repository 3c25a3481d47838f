"""A step of a block, which may be under a constraint."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vllm_dllm.reference.constraint import Constraint
from vllm_dllm.reference.constraint import known as known_tokens
from vllm_dllm.reference.edits import Known
from vllm_dllm.reference.policy import Block, unmask
from vllm_dllm.reference.sampling import remove_tokens


def sequence_of(
    prompt: Tensor, seq_len: int, mask_token_id: int, given: Sequence[int | None] = ()
) -> tuple[Tensor, Tensor]:
    """Return a sequence as decoding begins, and where it is masked: not where something is given of the answer (ours).

    Args:
        prompt: [prompt_len] int64; none of its positions is masked, whatever their ids.
        seq_len: positions.
        mask_token_id: what stands for masked.
        given: of each position of the answer, as far as it says; None where a token is to be generated.

    Returns: [seq_len] int64, and [seq_len] bool.
    """
    tokens = torch.cat((prompt, prompt.new_full((seq_len - len(prompt),), mask_token_id)))
    is_masked = torch.arange(seq_len, device=prompt.device) >= len(prompt)
    for position, token in enumerate(given, start=len(prompt)):
        if token is not None:
            tokens[position], is_masked[position] = token, False
    return tokens, is_masked


def under(
    constraint: Constraint | None, block: Block, tokens: Tensor, prompt_len: int, given: Sequence[int | None] = ()
) -> Block:
    """Return a block with what its answer has to meet, if anything.

    Args:
        constraint: of the answer.
        block: of the sequence.
        tokens: [seq_len] int64, known before the block.
        prompt_len: where the answer begins.
        given: as of `sequence_of`.
    """
    if constraint is None:
        return block
    before, behind = tokens[prompt_len : block.begin].tolist(), given[block.begin + block.length - prompt_len :]
    return replace(block, constraint=constraint.of_block(before, max(0, prompt_len - block.begin), behind))


def decide(known: Known, logits: Tensor, is_masked: Tensor, first: int, block: Block) -> tuple[Tensor, Tensor, Tensor]:
    """Do what `policy.unmask` does with the logits that the request wants, and as its block's constraint has it.

    Args:
        known: of the sequence.
        logits, is_masked, first, block: as of `policy.unmask`.

    Returns: indices into the span and their tokens, two [count] int64, and the log-probabilities of all that each could
        have been, [count, vocab] float64: of the logits that the policy was given, before temperature and filters, and
        before `credit` raises any.
    """
    edits = block.sampling.edits
    tokens = known.tokens[first : first + len(logits)]
    begin = block.begin - first
    own = slice(begin, begin + block.length)
    canvas = known_tokens(tokens[own], is_masked[own])
    logits = known.edited(logits, is_masked, first, edits)
    if block.constraint is not None:
        allowed = block.constraint.remove_forbidden(logits[own], canvas)
        logits = torch.cat([logits[:begin], allowed, logits[own.stop :]])
    chosen, chosen_tokens = unmask(logits, is_masked, first=first, block=block)
    if block.constraint is not None:
        taken = block.constraint.taken(canvas, (chosen - begin).tolist(), chosen_tokens.tolist())
        chosen, chosen_tokens = chosen[taken], chosen_tokens[taken]
    chosen, chosen_tokens = known.goes(chosen, chosen_tokens, first, edits)
    open_logits = remove_tokens(logits[chosen].double(), block.sampling.forbidden_ids)
    return chosen, chosen_tokens, open_logits.log_softmax(-1)
