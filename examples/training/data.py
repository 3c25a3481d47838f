"""Batches of questions with their answers, and how much of them a training step masks."""

import random

import torch
from tasks import TASKS, draw
from tokenizer import SPECIAL_TOKENS
from torch import Tensor
from transformers import PreTrainedTokenizerBase

EOS, BOS, MASK, EOT = map(SPECIAL_TOKENS.index, ("<|endoftext|>", "<|startoftext|>", "<|mdm_mask|>", "<|eot_id|>"))
TASK_WEIGHTS = {"add": 4, "max": 2, "count": 3}  # the others: 1
MIN_RATIO = 0.1  # smallest share of masked tokens: bounds the weight 1/share


def encode(tokenizer: PreTrainedTokenizerBase, rng: random.Random, length: int) -> tuple[list[int], int]:
    """Draw an example that fits a sequence length; returns its ids, padded with EOS, and the prompt's length."""
    weights = [TASK_WEIGHTS.get(task, 1) for task in TASKS]
    while True:
        example = draw(rng.choices(list(TASKS), weights)[0], rng, held_out=False)
        messages = [{"role": "user", "content": example.question}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompt, answer = tokenizer([text, example.answer])["input_ids"]
        padding = length - len(prompt) - len(answer)
        if padding > 0:
            return prompt + answer + [EOS] * padding, len(prompt)


def make_batch(
    tokenizer: PreTrainedTokenizerBase, rng: random.Random, num_tokens: int, length: int
) -> tuple[Tensor, Tensor]:
    """Draw sequences of one length: ids [batch, length] int64 and is_response [batch, length] bool."""
    rows = [encode(tokenizer, rng, length) for _ in range(num_tokens // length)]
    prompt_lens = torch.tensor([prompt_len for _, prompt_len in rows])
    return torch.tensor([ids for ids, _ in rows]), torch.arange(length) >= prompt_lens[:, None]


def mask_ratios(count: int) -> Tensor:
    """Draw shares of masked tokens: evenly spaced with one random offset, uniform each and varying less together."""
    return ((torch.arange(count) + torch.rand(1)) / count).clamp(min=MIN_RATIO)
