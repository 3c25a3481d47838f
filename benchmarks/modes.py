"""The modes of a checkpoint that is an autoregressive model, too: forwards that each of them takes for a token."""

import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_dllm.cli.inputs import family_for, read_config
from vllm_dllm.errors import ConfigError
from vllm_dllm.measure.decode import Policy
from vllm_dllm.measure.process import EngineProcess
from vllm_dllm.measure.report import Row, Section
from vllm_dllm.measure.workload import EngineSpec, Measurement, UnequalTokensError, Workload
from vllm_dllm.spiffy_config import METHOD

SPEC: dict[str, Any] = {"mode": "self_speculation"}


def compare_modes(workload: Workload, policies: tuple[Policy, ...]) -> list[Section]:
    """Decode the prompts in each mode, up to EOS, and count forwards; autoregression takes one for each token.

    Raises: UnequalTokensError where self-speculation's tokens depend on the adapter; ConfigError for a model that is
        trained for diffusion alone.
    """
    family = family_for(workload.model, read_config(workload.model))
    if family.causal_class is None:
        raise ConfigError(f"model is {family.architecture}, which has one mode; choose one that is autoregressive, too")
    workload = replace(workload, stop_at_eos=True)
    rows = [_row("ar", "", None)]
    for policy in policies:
        rows.append(_row("diffusion", policy.name, _measure(workload, policy.settings)))
        drafts = {"method": METHOD, "draft_graph": policy.draft_graph}
        rows.append(_row("diffusion, Spiffy", policy.name, _measure(workload, policy.settings, drafts)))
    with tempfile.TemporaryDirectory() as folder:
        for path in Path(workload.model).iterdir():
            if path.name != family.draft_adapter:
                os.symlink(path.resolve(), Path(folder) / path.name)
        bare = _measure(replace(workload, model=folder), SPEC)
    rows.append(_row("self-speculation, no adapter", "", bare))
    if (Path(workload.model) / str(family.draft_adapter)).is_dir():
        adapted = _measure(workload, SPEC)
        rows.append(_row("self-speculation", "", adapted))
        if adapted.tokens != bare.tokens:
            raise UnequalTokensError("the tokens of self-speculation depend on the adapter")
    return [Section("forwards of each mode", rows)]


def _measure(
    workload: Workload, settings: dict[str, Any], speculative_config: dict[str, Any] | None = None
) -> Measurement:
    with EngineProcess(EngineSpec(workload, settings, speculative_config)) as engine:
        return engine.measure(max(workload.concurrency))


def _row(mode: str, policy: str, measured: Measurement | None) -> Row:
    if measured is None:
        return {"mode": mode, "policy": "", "tokens": "", "forwards/token": 1.0, "tokens/forward": 1.0, "accepted": ""}
    proposed = sum(measured.stats.proposed)
    return {
        "mode": mode,
        "policy": policy,
        "tokens": measured.num_tokens,
        "forwards/token": measured.stats.nfe / measured.num_tokens,
        "tokens/forward": measured.num_tokens / measured.stats.nfe,
        "accepted": measured.stats.total_accepted / proposed if proposed else "",
    }
