"""What the look-ahead (`draft.look_ahead`) is worth to a block-causal model, on traces that `vllm-dllm calibrate` left.

    python -m benchmarks.ablations.across graph.json.traces --eos-token-id 151643

It takes the rows of two drafts, so it is compared with two more drafts inside the block. For traces of temperature 0:
the likeliest end is then known from the tokens alone. Calibrates on a part of the prompts and measures on the others.
"""

import argparse
from collections.abc import Sequence

import numpy as np

from benchmarks.ablations.drafting import BUDGETS, Material, load, traces_file
from vllm_dllm.calibrate.simulate import BlockDrafts, accept_paths, draft_blocks, until_eos
from vllm_dllm.calibrate.trace import BlockTrace, PromptTrace
from vllm_dllm.draft.look_ahead import NUM_NODES
from vllm_dllm.errors import ConfigError

GRAPH_NODES = 32


def count_across(
    traces: Sequence[PromptTrace], drafts: Sequence[BlockDrafts], budget: int, mask_token_id: int
) -> tuple[int, int]:
    """Count forwards when each forward with drafts also looks ahead.

    Args:
        traces: decoded at temperature 0.
        drafts: of their blocks, in order.
        budget: drafts inside the block.
        mask_token_id: what a masked position holds.

    Returns: forwards without looking ahead, and with it.
    """
    remaining = iter(drafts)
    within = across = 0
    for trace in traces:
        is_decided = False  # the block's first step
        for block in trace.blocks:
            anchors = [anchor for anchor, _ in accept_paths(next(remaining), budget)]
            within += 1 + len(anchors)
            across += 1 + len(anchors) - is_decided
            # A forward's guess replaces the one before it, so the last counts. A first step that finishes has none.
            is_decided = bool(anchors) and foresees_end(block, anchors[-1], mask_token_id)
    return within, across


def foresees_end(block: BlockTrace, anchor: int, mask_token_id: int) -> bool:
    """Tell whether the likeliest tokens of an anchor's distribution fill its root as the block ended."""
    root = block.canvas[anchor + 1]
    guess = np.where(root == mask_token_id, block.token_ids[anchor, :, 0], root)
    return bool((guess == block.canvas[-1]).all())


def rows(material: Material, eos_token_id: int | None) -> list[tuple[int, float, float, float]]:
    """Return, by budget, forwards without any drafts for each one with them: inside, two more inside, across.

    Raises: ConfigError for traces of a temperature.
    """
    if material.decoding.temperature > 0 or material.decoding.is_random:
        raise ConfigError("the traces are of a temperature or of policy 'random'; give some of temperature 0")
    graph = material.graph(GRAPH_NODES)
    texts = [trace if eos_token_id is None else until_eos(trace, eos_token_id) for trace in material.held_out]
    drafts = draft_blocks(graph, texts, material.decoding)
    num_steps = sum(block.num_steps for trace in texts for block in trace.blocks)
    table = []
    for budget in BUDGETS:
        within, across = count_across(texts, drafts, budget, material.decoding.mask_token_id)
        more, _ = count_across(texts, drafts, budget + NUM_NODES, material.decoding.mask_token_id)
        table.append((budget, num_steps / within, num_steps / more, num_steps / across))
    return table


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=traces_file)
    parser.add_argument("--held-out", type=float, default=0.5)
    parser.add_argument("--eos-token-id", type=int, help="leave out the blocks behind the one with this token")
    args = parser.parse_args()
    print("| drafts inside the block | that many | two more | that many and across its end |\n|---|---|---|---|")
    for budget, within, more, across in rows(load(args.traces, args.held_out), args.eos_token_id):
        print(f"| {budget} | {within:.2f} | {more:.2f} | {across:.2f} |")


if __name__ == "__main__":
    main()
