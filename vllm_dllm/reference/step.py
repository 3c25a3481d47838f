"""A step of a block, which may be under a constraint."""

from dataclasses import replace

import torch
from torch import Tensor

from vllm_dllm.reference.constraint import Constraint
from vllm_dllm.reference.constraint import known as known_tokens
from vllm_dllm.reference.edits import Known
from vllm_dllm.reference.policy import Block, unmask


def under(constraint: Constraint | None, block: Block, answer: Tensor) -> Block:
    """Return a block with what its answer has to meet, if anything; `answer` [len] int64 is what comes before."""
    if constraint is None:
        return block
    return replace(block, constraint=constraint.of_block(answer.tolist(), block.length - block.num_masked))


def decide(known: Known, logits: Tensor, is_masked: Tensor, first: int, block: Block) -> tuple[Tensor, Tensor]:
    """Do what `policy.unmask` does with the logits that the request wants, and as its block's constraint has it.

    Args:
        known: of the sequence.
        logits, is_masked, first, block: as of `policy.unmask`.
    """
    edits = block.sampling.edits
    tokens = known.tokens[first : first + len(logits)]
    logits = known.edited(logits, is_masked, first, edits)
    return known.goes(*step_block(logits, tokens, is_masked, first, block), first, edits)


def step_block(logits: Tensor, tokens: Tensor, is_masked: Tensor, first: int, block: Block) -> tuple[Tensor, Tensor]:
    """Do what `policy.unmask` does, as the block's constraint has it.

    Args:
        logits, is_masked, first, block: as of `policy.unmask`.
        tokens: [span_len] int64, known where not masked.
    """
    if block.constraint is None:
        return unmask(logits, is_masked, first=first, block=block)
    begin = block.begin - first
    own = slice(begin, begin + block.length)
    canvas = known_tokens(tokens[own], is_masked[own])
    allowed = block.constraint.remove_forbidden(logits[own], canvas)
    logits = torch.cat([logits[:begin], allowed, logits[own.stop :]])
    chosen, chosen_tokens = unmask(logits, is_masked, first=first, block=block)
    taken = block.constraint.taken(canvas, (chosen - begin).tolist(), chosen_tokens.tolist())
    return chosen[taken], chosen_tokens[taken]
