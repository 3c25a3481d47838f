"""Measure how many held-out questions a tiny model answers right, under the reference decoders."""

import argparse
import random
from pathlib import Path

import torch
from tasks import TASKS, draw
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from vllm_dllm.reference import block_causal, decode
from vllm_dllm.reference.model import LLaDA
from vllm_dllm.reference.nemotron import Nemotron
from vllm_dllm.reference.policy import NEMOTRON, SDAR, UnmaskPolicy
from vllm_dllm.reference.qwen import Qwen

MODELS = {"llada": LLaDA, "sdar": Qwen, "nemotron": Nemotron}
BLOCK_LENGTHS = {"llada": 32, "sdar": 8, "nemotron": 32}
POLICIES = ("static", "threshold", "factor", "sequential", "dynamic", "entropy_bounded")


def generate(model: LLaDA | Qwen, prompt: Tensor, options: argparse.Namespace) -> decode.Generation:
    """Decode after a prompt [prompt_len] int64; a block-causal model ends behind the block with an EOS."""
    lengths = {"gen_length": options.gen_length, "block_length": options.block_length}
    if options.policy == "ar":
        assert isinstance(model, Nemotron), "the others are no autoregressive models"
        return causally(model, prompt, options.gen_length)
    policy = UnmaskPolicy(options.policy, threshold=options.threshold, confidence_dtype=torch.float64)
    if isinstance(model, Qwen):
        rules = NEMOTRON if isinstance(model, Nemotron) else SDAR
        ends = (model.config.eos_token_id,)
        return block_causal.generate(model, prompt, policy=policy, stop_ids=ends, rules=rules, **lengths)
    return decode.generate(model, prompt, kv=decode.KvPolicy(options.kv), policy=policy, **lengths)


def causally(model: Nemotron, prompt: Tensor, gen_length: int) -> decode.Generation:
    """Decode token by token up to EOS, a forward each."""
    tokens = block_causal.generate_causally(model, prompt, gen_length)
    is_end = tokens == model.config.eos_token_id
    nfe = int(is_end.int().argmax()) + 1 if is_end.any() else len(tokens)
    return decode.Generation(tokens[:nfe], nfe, 0, tokens[None, :nfe])


def count_right(
    model: LLaDA | Qwen, tokenizer: PreTrainedTokenizerBase, task: str, options: argparse.Namespace
) -> tuple[int, int]:
    """Answer held-out questions of a task; returns how many answers are right, and all forwards."""
    rng = random.Random(f"{options.seed} {task}")
    examples = [draw(task, rng, held_out=True) for _ in range(options.num_questions)]
    num_right = num_forwards = 0
    for example in examples:
        messages = [{"role": "user", "content": example.question}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        generation = generate(model, torch.tensor(tokenizer(text)["input_ids"]), options)
        tokens = generation.tokens.tolist()
        end = tokens.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in tokens else len(tokens)
        given = str(tokenizer.decode(tokens[:end]))
        num_right += given == example.answer
        num_forwards += generation.nfe
        if options.verbose and given != example.answer:
            print(f"  {example.question!r}: {given!r} instead of {example.answer!r}", flush=True)
    return num_right, num_forwards


def main() -> None:
    """Print the share of right answers and the forwards per answer, per task and over all."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("family", choices=MODELS)
    parser.add_argument("--checkpoint", type=Path, help="default: the one of the repository")
    parser.add_argument("--gen-length", type=int, default=64)
    parser.add_argument("--block-length", type=int, help="default: 8 for sdar, else 32")
    parser.add_argument("--kv", choices=("none", "prefix", "dual"), default="none", help="llada alone")
    parser.add_argument("--policy", choices=(*POLICIES, "ar"), default="static", help="ar: nemotron, token by token")
    parser.add_argument("--threshold", type=float, default=0.9)
    parser.add_argument("--num-questions", type=int, default=50, help="per task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--verbose", action="store_true", help="print the wrong answers")
    options = parser.parse_args()
    checkpoint = options.checkpoint or Path(__file__).parents[1] / f"tiny_{options.family}" / "checkpoint"
    options.block_length = options.block_length or BLOCK_LENGTHS[options.family]

    torch.set_num_threads(options.threads)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    model = MODELS[options.family].from_pretrained(checkpoint, torch.float32)
    counts = {task: count_right(model, tokenizer, task, options) for task in TASKS}
    counts["all"] = tuple(map(sum, zip(*counts.values(), strict=True)))
    for name, (num_right, num_forwards) in counts.items():
        num = options.num_questions * (len(TASKS) if name == "all" else 1)
        print(f"{name:10}{num_right / num:7.1%}{num_forwards / num:8.1f} forwards")


if __name__ == "__main__":
    main()
