"""Measure how many held-out questions the tiny LLaDA answers right, under the reference decoder."""

import argparse
import random
from pathlib import Path

import torch
from tasks import TASKS, draw
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from vllm_dllm.reference.decode import KvPolicy, generate
from vllm_dllm.reference.model import LLaDA
from vllm_dllm.reference.policy import UnmaskPolicy


def answer(model: LLaDA, tokenizer: PreTrainedTokenizerBase, question: str, options: argparse.Namespace) -> str:
    """Decode the answer to a question and cut it at the first EOS."""
    messages = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    tokens = generate(
        model,
        torch.tensor(tokenizer(text)["input_ids"]),
        gen_length=options.gen_length,
        block_length=options.block_length,
        kv=KvPolicy(options.kv),
        policy=UnmaskPolicy(options.policy),
    ).tokens.tolist()
    end = tokens.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in tokens else len(tokens)
    return str(tokenizer.decode(tokens[:end]))


def count_right(model: LLaDA, tokenizer: PreTrainedTokenizerBase, task: str, options: argparse.Namespace) -> int:
    """Count the right answers to held-out questions of a task."""
    rng = random.Random(f"{options.seed} {task}")
    examples = [draw(task, rng, held_out=True) for _ in range(options.num_questions)]
    num_right = 0
    for example in examples:
        given = answer(model, tokenizer, example.question, options)
        num_right += given == example.answer
        if options.verbose and given != example.answer:
            print(f"  {example.question!r}: {given!r} instead of {example.answer!r}", flush=True)
    return num_right


def main() -> None:
    """Print the share of right answers per task and over all."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--checkpoint", type=Path, default=Path(__file__).parent / "checkpoint")
    parser.add_argument("--gen-length", type=int, default=64)
    parser.add_argument("--block-length", type=int, default=32)
    parser.add_argument("--kv", choices=("none", "prefix", "dual"), default="none")
    parser.add_argument("--policy", choices=("static", "threshold", "factor"), default="static")
    parser.add_argument("--num-questions", type=int, default=50, help="per task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--verbose", action="store_true", help="print the wrong answers")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
    model = LLaDA.from_pretrained(options.checkpoint, torch.float32)
    num_right = {task: count_right(model, tokenizer, task, options) for task in TASKS}
    for task, num in num_right.items():
        print(f"{task:10}{num / options.num_questions:7.1%}")
    print(f"{'all':10}{sum(num_right.values()) / (options.num_questions * len(TASKS)):7.1%}")


if __name__ == "__main__":
    main()
