"""Hand-made traces: a text is unmasked in a given order, and the model foresees it to a given degree."""

import numpy as np

from vllm_dllm.calibrate.trace import BlockTrace, PromptTrace

MASK = 3
NUM_CANDIDATES = 4


def make_block(text, steps, confidence, *, wrong=(), start=10):
    """A block whose step s unmasks the positions steps[s]; a distribution never changes.

    Args:
        text: the tokens in the end.
        steps: positions, step by step.
        confidence: of each position.
        wrong: positions whose token is the second candidate; "never" in a dict keeps it out of the candidates.
    """
    block_length, num_steps = len(text), len(steps)
    canvas = np.full((num_steps + 1, block_length), MASK, dtype=np.int32)
    for step, positions in enumerate(steps):
        canvas[step + 1] = canvas[step]
        canvas[step + 1, positions] = np.array(text)[positions]
    others = 1000 + np.arange(NUM_CANDIDATES * block_length).reshape(block_length, -1)
    token_ids = others.astype(np.int32)
    probs = np.array(confidence)[:, None] * 0.5 ** np.arange(NUM_CANDIDATES)
    for position, token in enumerate(text):
        rank = wrong[position] if isinstance(wrong, dict) and position in wrong else int(position in wrong)
        if rank is not None:
            token_ids[position, rank] = token
    return BlockTrace(
        start,
        canvas,
        np.repeat(token_ids[None], num_steps, axis=0),
        np.repeat(np.log(probs)[None], num_steps, axis=0),
    )


def make_trace(*blocks, prompt_idx=0, seed=0):
    return PromptTrace(prompt_idx, seed, blocks)


def random_trace(rng, *, prompt_idx=0, block_length=8, num_blocks=2, most_per_step=1):
    """Blocks unmasked in about the order of their confidence, with tokens that are mostly foreseen."""
    blocks = []
    for number in range(num_blocks):
        confidence = rng.uniform(0.1, 0.99, block_length)
        order = np.argsort(-(confidence + rng.normal(0, 0.2, block_length)))
        cuts, steps = 0, []
        while cuts < block_length:
            size = int(rng.integers(1, most_per_step + 1))
            steps.append([int(position) for position in order[cuts : cuts + size]])
            cuts += size
        text = rng.integers(10, 200, block_length).tolist()
        wrong = {position: 1 for position in range(block_length) if rng.uniform() < 0.2}
        blocks.append(make_block(text, steps, confidence, wrong=wrong, start=number * block_length))
    return make_trace(*blocks, prompt_idx=prompt_idx, seed=prompt_idx)
