"""A step of a block, which may be under a constraint."""

from dataclasses import replace

import torch
from torch import Tensor

from vllm_dllm.reference.constraint import Constraint
from vllm_dllm.reference.constraint import known as known_tokens
from vllm_dllm.reference.edits import Known
from vllm_dllm.reference.policy import Block, unmask
from vllm_dllm.reference.sampling import remove_tokens


def under(constraint: Constraint | None, block: Block, answer: Tensor) -> Block:
    """Return a block with what its answer has to meet, if anything; `answer` [len] int64 is what comes before."""
    if constraint is None:
        return block
    return replace(block, constraint=constraint.of_block(answer.tolist(), block.length - block.num_masked))


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
