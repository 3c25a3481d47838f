"""Tokens per second and forwards of the engine beside the plain reference decoders, in one run."""

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vllm_dllm.bench.process import EngineProcess
from vllm_dllm.bench.report import Row, Section
from vllm_dllm.bench.workload import EngineSpec, Measurement, UnequalTokensError, Workload
from vllm_dllm.reference import block_causal, decode
from vllm_dllm.reference.decode import Generation, KvPolicy, Model
from vllm_dllm.reference.model import LLaDA
from vllm_dllm.reference.policy import DREAM, LLADA, Rules, UnmaskPolicy
from vllm_dllm.reference.qwen import Qwen
from vllm_dllm.reference.sampling import Sampling

POLICIES: tuple[dict[str, Any], ...] = ({"policy": "static"}, {"policy": "threshold", "threshold": 0.9})


def compare_with_reference(workload: Workload) -> list[Section]:
    """Measure the reference and the engine on the same prompts, and check that the tokens are equal.

    Raises: UnequalTokensError.
    """
    decoders = _decoders(Path(workload.model))
    rows = [row for settings in POLICIES for row in _policy_rows(workload, decoders, settings)]
    title = (
        f"{len(workload.prompts)} prompts, {workload.gen_length} tokens each in blocks of {workload.block_length}, "
        "fp32; the reference decodes them one after another"
    )
    return [Section(title, rows)]


Decoder = Callable[..., Generation]


def _decoders(checkpoint: Path) -> dict[str, Decoder]:
    """Return the reference decoders of a checkpoint's family by name; the engine's tokens are those of the last."""
    architecture = json.loads((checkpoint / "config.json").read_text())["architectures"][0]
    if architecture == "LLaDAModelLM":
        return _bidirectional(LLaDA.from_pretrained(checkpoint, torch.float32), LLADA)
    qwen = Qwen.from_pretrained(checkpoint, torch.float32)
    if architecture == "DreamModel":
        return _bidirectional(qwen, DREAM)
    return {"reference": partial(block_causal.generate, qwen, sampling=_greedy(qwen))}


def _bidirectional(model: Model, rules: Rules) -> dict[str, Decoder]:
    generate = partial(decode.generate, model, sampling=_greedy(model), rules=rules)
    return {
        "reference, no cache": partial(generate, kv=KvPolicy("none")),
        "reference, dual cache": partial(generate, kv=KvPolicy("dual")),
    }


def _greedy(model: Model) -> Sampling:
    return Sampling(forbidden_ids=(model.config.mask_token_id,))


def _policy_rows(workload: Workload, decoders: dict[str, Decoder], settings: dict[str, Any]) -> list[Row]:
    name = " ".join(map(str, settings.values()))
    policy = UnmaskPolicy(settings["policy"], confidence_dtype=torch.float64)
    measured = {decoder: _decode(workload, generate, policy) for decoder, generate in decoders.items()}
    cached = list(measured.values())[-1]
    with EngineProcess(EngineSpec(workload, settings)) as engine:
        for concurrency in workload.concurrency:
            engine.measure(concurrency, num_prompts=concurrency)
            found = engine.measure(concurrency)
            if found.tokens != cached.tokens:
                raise UnequalTokensError(
                    f"{name}: the engine's tokens differ from the reference's, {concurrency} at once"
                )
            measured[f"engine, {concurrency} at once"] = found
    return [{"policy": name, "decoder": decoder, **_row(taken, cached)} for decoder, taken in measured.items()]


def _decode(workload: Workload, generate: Decoder, policy: UnmaskPolicy) -> Measurement:
    """Decode the prompts one after another, greedily, EOS or not."""
    taken, begin = Measurement([]), time.perf_counter()
    for prompt in workload.prompts:
        generation = generate(
            torch.tensor(prompt), gen_length=workload.gen_length, block_length=workload.block_length, policy=policy
        )
        taken.tokens.append(generation.tokens[: workload.gen_length].tolist())
        taken.stats.forwards += generation.nfe - generation.nfe_refresh
        taken.stats.refreshes += generation.nfe_refresh
    taken.seconds = time.perf_counter() - begin
    return taken


def _row(taken: Measurement, cached: Measurement) -> Row:
    return {
        "tokens/s": taken.tokens_per_s,
        "NFE/token": taken.nfe / taken.num_tokens,
        "refreshes/token": taken.stats.refreshes / taken.num_tokens,
        "speed-up": taken.tokens_per_s / cached.tokens_per_s,
    }
