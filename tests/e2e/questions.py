"""The trained model of the repository, and what it was made for."""

import itertools
import random
import runpy
from pathlib import Path

from transformers import AutoTokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"
CHECKPOINT = EXAMPLES / "tiny_llada/checkpoint"


def questions(count: int, checkpoint: Path = CHECKPOINT) -> list[tuple[int, ...]]:
    """Return prompts that the trained model was made for, in the tokens of a checkpoint."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tasks = runpy.run_path(str(EXAMPLES / "training/tasks.py"))
    rng = random.Random(0)
    kinds = itertools.islice(itertools.cycle(tasks["TASKS"]), count)
    texts = [tasks["draw"](kind, rng, held_out=True).question for kind in kinds]
    return [
        tuple(
            tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)["input_ids"]
        )
        for text in texts
    ]
