"""Tokens per second and forwards of the engine beside the plain reference decoders, in one run."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_dllm.cli.server_settings import num_positions
from vllm_dllm.errors import ConfigError
from vllm_dllm.measure.decode import Policy
from vllm_dllm.measure.process import EngineProcess
from vllm_dllm.measure.report import Row, Section
from vllm_dllm.measure.workload import EngineSpec, Measurement, UnequalTokensError, Workload
from vllm_dllm.models.interface import family_said
from vllm_dllm.reference import block_causal, wedlm
from vllm_dllm.reference.decode import Generation, KvPolicy, generate
from vllm_dllm.reference.llada2 import LLaDA2
from vllm_dllm.reference.model import LLaDA
from vllm_dllm.reference.nemotron import Nemotron
from vllm_dllm.reference.policy import Rules, UnmaskPolicy
from vllm_dllm.reference.qwen import Qwen
from vllm_dllm.reference.sampling import Sampling

Decode = Callable[[Tensor], Generation | wedlm.Sliding]
"""Decodes a prompt's ids."""
MODELS: dict[str, type[LLaDA | Qwen]] = {
    "LLaDAModelLM": LLaDA,
    "LLaDA2MoeModelLM": LLaDA2,
    "NemotronLabsDiffusionModel": Nemotron,
}
"""The reference models, by architecture; the other families' is `Qwen`."""


def compare_with_reference(workload: Workload, policies: Sequence[Policy]) -> list[Section]:
    """Measure the reference and the engine on the same prompts, and check that the tokens are equal.

    Raises: UnequalTokensError.
    """
    family = family_said(json.loads((Path(workload.model) / "config.json").read_text()))
    assert family is not None, "an engine serves models of ours only"
    rules = Rules(**{field.name: getattr(family, field.name) for field in fields(Rules)})
    model: Any = MODELS.get(family.architecture, Qwen).from_pretrained(Path(workload.model), torch.float32)
    has_windows = family.attention == "window"
    decoders: Callable[[Workload, Policy], dict[str, Decode]]
    decoders = partial(_sliding, model) if has_windows else partial(_decoders, model, rules)
    rows = [row for policy in policies for row in _policy_rows(workload, policy, decoders(workload, policy))]
    what = "windows" if has_windows else "blocks"
    title = (
        f"{len(workload.prompts)} prompts, {workload.gen_length} tokens each in {what} of {workload.block_length}, "
        "fp32; the reference decodes them one after another"
    )
    return [Section(title, rows)]


def _decoders(model: Any, rules: Rules, workload: Workload, policy: Policy) -> dict[str, Decode]:
    """Return the reference decoders; the engine does what the last one does."""
    block_length, parameters = workload.block_length, dict(policy.settings)
    name, steps = parameters.pop("policy"), parameters.pop("steps_per_block", None)
    if steps is not None and rules.attention == "bidirectional":  # of the whole region
        steps *= workload.gen_length // block_length
    unmask = UnmaskPolicy(name, steps=steps, confidence_dtype=torch.float64, **parameters)
    common: dict[str, Any] = {
        "gen_length": workload.gen_length,
        "block_length": block_length,
        "policy": unmask,
        "sampling": Sampling(forbidden_ids=(model.config.mask_token_id,)),
    }
    if rules.attention == "bidirectional" and workload.gen_length % block_length:
        raise ConfigError(
            f"--gen-length is {workload.gen_length}, but the reference decodes whole blocks of {block_length}; give a "
            "multiple of it"
        )
    if rules.attention != "bidirectional":
        return {"reference": partial(block_causal.generate, model, rules=rules, **common)}
    return {
        "reference, no cache": partial(generate, model, kv=KvPolicy("none"), rules=rules, **common),
        "reference, dual cache": partial(generate, model, kv=KvPolicy("dual"), rules=rules, **common),
    }


def _sliding(model: Qwen, workload: Workload, policy: Policy) -> dict[str, Decode]:
    """Return the reference decoder of windows that slide, which reach as far as the engine's model does."""
    decode = partial(
        wedlm.generate,
        model,
        gen_length=workload.gen_length,
        window=workload.block_length,
        rule=wedlm.WindowRule(**policy.settings),
        sampling=Sampling(forbidden_ids=(model.config.mask_token_id,)),
        limit=num_positions(workload.model),
    )
    return {"reference": decode}


def _policy_rows(workload: Workload, policy: Policy, decoders: dict[str, Decode]) -> list[Row]:
    measured = {name: _decode(workload, decode) for name, decode in decoders.items()}
    reference = list(measured.values())[-1]
    with EngineProcess(EngineSpec(workload, policy.settings)) as engine:
        for concurrency in workload.concurrency:
            engine.measure(concurrency, num_prompts=concurrency)
            found = engine.measure(concurrency)
            if found.tokens != reference.tokens:
                raise UnequalTokensError(
                    f"{policy.name}: the engine's tokens differ from the reference's, {concurrency} at once"
                )
            measured[f"engine, {concurrency} at once"] = found
    return [{"policy": policy.name, "decoder": name, **_row(taken, reference)} for name, taken in measured.items()]


def _decode(workload: Workload, decode: Decode) -> Measurement:
    """Decode the prompts one after another, greedily, EOS or not."""
    taken, begin = Measurement([]), time.perf_counter()
    for prompt in workload.prompts:
        generation = decode(torch.tensor(prompt))
        taken.tokens.append(generation.tokens[: workload.gen_length].tolist())
        refreshes = generation.nfe_refresh if isinstance(generation, Generation) else 0
        taken.stats.forwards += generation.nfe - refreshes
        taken.stats.refreshes += refreshes
    taken.seconds = time.perf_counter() - begin
    return taken


def _row(taken: Measurement, reference: Measurement) -> Row:
    return {
        "tokens/s": taken.tokens_per_s,
        "NFE/token": taken.stats.nfe / taken.num_tokens,
        "refreshes/token": taken.stats.refreshes / taken.num_tokens,
        "speed-up": taken.tokens_per_s / reference.tokens_per_s,
    }
