"""Build the tokenizer of the tiny LLaDA: byte-level BPE, one token per digit, one per word."""

import json
import random
from pathlib import Path

from tasks import TASKS, draw
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL_TOKENS = (
    "<|reserved_0|>",
    "<|endoftext|>",
    "<|startoftext|>",
    "<|mdm_mask|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|reserved_7|>",
)
"""Ids 0 to 7, in this order."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ ('<|startoftext|>' if loop.first else '') + '<|start_header_id|>' "
    "+ message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
VOCAB_SIZE = 376
_PIECES = r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+|\n+|\s"


def build(folder: Path, max_length: int) -> None:
    """Train the merges on drawn examples and write the tokenizer's files into a folder."""
    rng = random.Random(0)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    examples = [draw(task, rng, held_out=False) for task in TASKS for _ in range(2000)]
    texts = [text for example in examples for text in (example.question, example.answer)]
    tokenizer.train_from_iterator([*texts, *["user", "assistant", "system", "\n\n"] * 2000], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    # Written by hand: the class name that `save_pretrained` writes is unknown to transformers before 5.0.
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "mask_token": "<|mdm_mask|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
