"""How many forwards an answer takes: to the end of its reply, of the block that it ends in, and no further than needed.

    python -m benchmarks.ends CHECKPOINT PROMPTS [--prompts 24] [--max-tokens 128]

The reference decodes the prompts to their last block, as published; where the others would have stopped is read off its
states. A checkpoint of LLaDA or SDAR.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from vllm_dllm.calibrate.prompts import encode, read_prompts
from vllm_dllm.names import PolicyName
from vllm_dllm.reference import block_causal, decode
from vllm_dllm.reference.decode import Generation, KvPolicy
from vllm_dllm.reference.ends import Ends
from vllm_dllm.reference.model import LLaDA
from vllm_dllm.reference.policy import UnmaskPolicy
from vllm_dllm.reference.qwen import Qwen
from vllm_dllm.reference.sampling import Sampling

Policies = tuple[tuple[PolicyName, float], ...]
POLICIES: dict[str, Policies] = {
    "llada": (("static", 0.9), ("threshold", 0.9)),
    "sdar": (("static", 0.9), ("dynamic", 0.85)),
}
"""Names and thresholds, by `model_type`."""


def forwards(made: Generation, mask_token_id: int, ends: Ends, first_length: int, block_length: int) -> list[int]:
    """Return the forwards to the end of the reply, of the block that the answer ends in, and of the answer.

    Args:
        made: by a whole reply.
        mask_token_id: what stands for masked.
        ends: of the answer.
        first_length, block_length: positions of the first block that are generated, and of the others.
    """
    answer = len(ends.cut(made.tokens.tolist()))
    block_end = first_length + -(-max(0, answer - first_length) // block_length) * block_length
    counts = [made.nfe]
    for length in (block_end, answer):
        is_open = (made.history[:, :length] == mask_token_id).any(1)
        counts.append(int(is_open.sum()) + 1)
    return counts


def measured(checkpoint: Path, prompts: list[list[int]], max_tokens: int) -> list[dict[str, Any]]:
    """Decode the prompts by each policy."""
    content = json.loads((checkpoint / "config.json").read_text())
    kind = content["model_type"]
    model: Any = (LLaDA if kind == "llada" else Qwen).from_pretrained(checkpoint, torch.float32)
    block_length, mask = content.get("block_size", 32), content["mask_token_id"]
    ends = Ends((content["eos_token_id"],), max_tokens=max_tokens)
    rows = []
    for name, threshold in POLICIES[kind]:
        policy = UnmaskPolicy(name, threshold=threshold, confidence_dtype=torch.float64)
        total = torch.zeros(3, dtype=torch.int64)
        for ids in prompts:
            options: Any = {"block_length": block_length, "policy": policy, "sampling": Sampling(forbidden_ids=(mask,))}
            prompt, known = torch.tensor(ids), len(ids) % block_length
            if kind == "llada":
                made = decode.generate(model, prompt, gen_length=max_tokens, kv=KvPolicy("dual"), **options)
                known = 0
            else:
                made = block_causal.generate(model, prompt, gen_length=max_tokens, **options)
            total += torch.tensor(forwards(made, mask, ends, block_length - known, block_length))
        whole, block, answer = total.tolist()
        rows.append(
            {
                "model": checkpoint.name,
                "policy": name,
                "reply": whole,
                "block": block,
                "answer": answer,
                "saved of the block's": round(1 - answer / block, 3),
                "of the reply's": round(1 - answer / whole, 3),
            }
        )
    return rows


def main() -> None:
    """Print a row for each policy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--max-tokens", type=int, default=128)
    asked = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(asked.checkpoint)
    prompts = [encode(tokenizer, each) for each in read_prompts(asked.file, asked.prompts).conversations]
    for row in measured(asked.checkpoint, prompts, asked.max_tokens):
        print(json.dumps(row))


if __name__ == "__main__":
    main()
