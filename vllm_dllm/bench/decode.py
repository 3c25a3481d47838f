"""Tokens per second and forwards of the engine beside the plain reference decoders, in one run."""

import argparse
import time
from collections.abc import Sequence
from typing import Any

import torch
from vllm import LLM, SamplingParams

from vllm_dllm.reference.decode import KvPolicy, Sampling, UnmaskPolicy, generate
from vllm_dllm.reference.model import LLaDA

Row = dict[str, str | int | float]

POLICIES: dict[str, dict[str, Any]] = {
    "static, 1 per step": {"dllm_policy": "static"},
    "threshold 0.9": {"dllm_policy": "threshold", "dllm_threshold": 0.9},
}


def make_engine(args: argparse.Namespace, max_num_seqs: int) -> LLM:
    """Start an engine in this process."""
    return LLM(
        str(args.model),
        dtype="float32",
        max_num_seqs=max_num_seqs,
        kv_cache_memory_bytes=512 << 20,
        distributed_executor_backend="uni",
        additional_config={"dllm": {"block_length": args.block_length}},
    )


def encode(llm: LLM, questions: Sequence[str]) -> list[list[int]]:
    """Put questions into the chat template."""
    tokenizer = llm.get_tokenizer()
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], tokenize=False, add_generation_prompt=True)
        for q in questions
    ]
    return [tokenizer.encode(text, add_special_tokens=False) for text in texts]


def sampling_params(args: argparse.Namespace, policy: dict[str, Any]) -> SamplingParams:
    """Decode the whole generation greedily, EOS or not, so that everyone makes the same number of tokens."""
    return SamplingParams(temperature=0.0, max_tokens=args.gen_length, ignore_eos=True, extra_args=policy)


def compare(args: argparse.Namespace, questions: Sequence[str]) -> list[Row]:
    """Measure the reference and the engine on the same prompts, and check that the tokens are equal.

    Raises: RuntimeError when they are not.
    """
    llm = make_engine(args, max(args.concurrency))
    prompts = encode(llm, questions)
    model = LLaDA.from_pretrained(args.model, torch.float32)
    rows: list[Row] = []
    for name, options in POLICIES.items():
        _engine_row(args, llm, prompts[:1], options, 1)  # the first run pays for what is made once
        uncached, _ = _reference_row(args, model, prompts, options, KvPolicy("none"))
        dual, expected = _reference_row(args, model, prompts, options, KvPolicy("dual"))
        measured = {"reference, no cache": uncached, "reference, dual cache": dual}
        for concurrency in args.concurrency:
            row, tokens = _engine_row(args, llm, prompts, options, concurrency)
            if tokens != expected:
                raise RuntimeError(f"{name}: the engine's tokens differ from the reference's, {concurrency} at once")
            measured[f"engine, {concurrency} at once"] = row
        for decoder, row in measured.items():
            speed_up = row["tokens/s"] / dual["tokens/s"]
            rows.append({"policy": name, "decoder": decoder, **row, "speed-up": speed_up})
    llm.llm_engine.engine_core.shutdown()
    return rows


def _reference_row(
    args: argparse.Namespace, model: LLaDA, prompts: list[list[int]], options: dict[str, Any], kv: KvPolicy
) -> tuple[dict[str, float], list[list[int]]]:
    """Decode the prompts one after another."""
    policy = UnmaskPolicy(
        options["dllm_policy"], threshold=options.get("dllm_threshold", 0.9), confidence_dtype=torch.float64
    )
    sampling = Sampling(forbidden_ids=(model.config.mask_token_id,))
    outputs, nfe, nfe_refresh, begin = [], 0, 0, time.perf_counter()
    for prompt in prompts:
        generation = generate(
            model,
            torch.tensor(prompt),
            gen_length=args.gen_length,
            block_length=args.block_length,
            kv=kv,
            policy=policy,
            sampling=sampling,
        )
        outputs.append(generation.tokens.tolist())
        nfe += generation.nfe
        nfe_refresh += generation.nfe_refresh
    seconds = time.perf_counter() - begin
    tokens = len(outputs) * args.gen_length
    row = {"tokens/s": tokens / seconds, "NFE/token": nfe / tokens, "refreshes/token": nfe_refresh / tokens}
    return row, outputs


def _engine_row(
    args: argparse.Namespace, llm: LLM, prompts: list[list[int]], options: dict[str, Any], concurrency: int
) -> tuple[dict[str, float], list[list[int]]]:
    """Decode all prompts, `concurrency` of them at a time."""
    counters = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model_state.counters
    before = (counters.nfe_denoise, counters.nfe_refresh)
    outputs: list[list[int]] = []
    begin = time.perf_counter()
    for first in range(0, len(prompts), concurrency):
        batch = [{"prompt_token_ids": prompt} for prompt in prompts[first : first + concurrency]]
        replies = llm.generate(batch, sampling_params(args, options), use_tqdm=False)
        outputs += [list(reply.outputs[0].token_ids) for reply in replies]
    seconds = time.perf_counter() - begin
    tokens = len(outputs) * args.gen_length
    denoise, refresh = counters.nfe_denoise - before[0], counters.nfe_refresh - before[1]
    row = {
        "tokens/s": tokens / seconds,
        "NFE/token": (denoise + refresh) / tokens,
        "refreshes/token": refresh / tokens,
    }
    return row, outputs
