"""Tokens per second and forwards of the engine beside the plain reference decoders, in one run."""

import time
from pathlib import Path
from typing import Any

import torch

from vllm_dllm.bench.process import EngineProcess
from vllm_dllm.bench.report import Row, Section
from vllm_dllm.bench.workload import EngineSpec, Measurement, UnequalTokensError, Workload
from vllm_dllm.reference.decode import KvPolicy, generate
from vllm_dllm.reference.model import LLaDA
from vllm_dllm.reference.policy import UnmaskPolicy
from vllm_dllm.reference.sampling import Sampling

POLICIES: tuple[dict[str, Any], ...] = ({"policy": "static"}, {"policy": "threshold", "threshold": 0.9})


def compare_with_reference(workload: Workload) -> list[Section]:
    """Measure the reference and the engine on the same prompts, and check that the tokens are equal.

    Raises: UnequalTokensError.
    """
    model = LLaDA.from_pretrained(Path(workload.model), torch.float32)
    rows = [row for settings in POLICIES for row in _policy_rows(workload, model, settings)]
    title = (
        f"{len(workload.prompts)} prompts, {workload.gen_length} tokens each in blocks of {workload.block_length}, "
        "fp32; the reference decodes them one after another"
    )
    return [Section(title, rows)]


def _policy_rows(workload: Workload, model: LLaDA, settings: dict[str, Any]) -> list[Row]:
    name = " ".join(map(str, settings.values()))
    policy = UnmaskPolicy(settings["policy"], confidence_dtype=torch.float64)
    uncached, dual = (_decode(workload, model, policy, kv) for kv in (KvPolicy("none"), KvPolicy("dual")))
    measured = {"reference, no cache": uncached, "reference, dual cache": dual}
    with EngineProcess(EngineSpec(workload, settings)) as engine:
        for concurrency in workload.concurrency:
            engine.measure(concurrency, num_prompts=concurrency)
            found = engine.measure(concurrency)
            if found.tokens != dual.tokens:
                raise UnequalTokensError(
                    f"{name}: the engine's tokens differ from the reference's, {concurrency} at once"
                )
            measured[f"engine, {concurrency} at once"] = found
    return [{"policy": name, "decoder": decoder, **_row(taken, dual)} for decoder, taken in measured.items()]


def _decode(workload: Workload, model: LLaDA, policy: UnmaskPolicy, kv: KvPolicy) -> Measurement:
    """Decode the prompts one after another, greedily, EOS or not."""
    taken, begin = Measurement([]), time.perf_counter()
    for prompt in workload.prompts:
        generation = generate(
            model,
            torch.tensor(prompt),
            gen_length=workload.gen_length,
            block_length=workload.block_length,
            kv=kv,
            policy=policy,
            sampling=Sampling(forbidden_ids=(model.config.mask_token_id,)),
        )
        taken.tokens.append(generation.tokens.tolist())
        taken.stats.forwards += generation.nfe - generation.nfe_refresh
        taken.stats.refreshes += generation.nfe_refresh
    taken.seconds = time.perf_counter() - begin
    return taken


def _row(taken: Measurement, dual: Measurement) -> Row:
    return {
        "tokens/s": taken.tokens_per_s,
        "NFE/token": taken.nfe / taken.num_tokens,
        "refreshes/token": taken.stats.refreshes / taken.num_tokens,
        "speed-up": taken.tokens_per_s / dual.tokens_per_s,
    }
