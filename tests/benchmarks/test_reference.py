"""`python -m benchmarks reference` decodes a family by its own rule, beside engines that say what they are told to."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import reference
from tests.e2e import first_token, llada2
from tests.e2e.rig import Case, Oracle
from vllm_dllm.measure.decode import Policy
from vllm_dllm.measure.workload import EngineSpec, Measurement, UnequalTokensError, Workload

PROMPTS = ((5, 6, 7), tuple(range(8, 29)))
LENGTH, PER_BLOCK = 21, 4
POLICIES = (
    Policy({"policy": "static", "steps_per_block": PER_BLOCK}),
    Policy({"policy": "threshold", "threshold": 0.05}),
)


def nemotron(path: Path) -> Oracle:
    first_token.make_wild("nemotron", path, mixing=0.3)
    return first_token.FirstTokenOracle(path, "nemotron")


def of_llada2(path: Path) -> Oracle:
    return llada2.LLaDA2Oracle(llada2.make_random(path, mixing=0.3))


def tokens_of(oracle: Oracle, settings: dict[str, Any], block_length: int) -> list[list[int]]:
    """What the decoder that engines are tested with makes of the prompts."""
    own = {name: value for name, value in settings.items() if name != "steps_per_block"}
    steps = PER_BLOCK * -(-LENGTH // block_length) if "steps_per_block" in settings else None
    cases = [Case(prompt=prompt, max_tokens=LENGTH, steps=steps, **own) for prompt in PROMPTS]
    return [oracle.tokens(case, {"block_length": block_length}) for case in cases]


def give(monkeypatch: pytest.MonkeyPatch, tokens: Callable[[EngineSpec], list[list[int]]]) -> None:
    """Have engines say these tokens."""

    def engine(spec: EngineSpec) -> Any:
        return nullcontext(SimpleNamespace(measure=lambda concurrency, **_: Measurement(tokens(spec), seconds=1.0)))

    monkeypatch.setattr(reference, "EngineProcess", engine)


@pytest.mark.parametrize(("make", "block_length"), [(nemotron, 8), (of_llada2, 4)])
def test_a_family_is_decoded_by_its_own_rule(
    make: Callable[[Path], Oracle], block_length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    oracle = make(tmp_path / "checkpoint")
    workload = Workload(str(tmp_path / "checkpoint"), PROMPTS, LENGTH, block_length, (1, 2))
    give(monkeypatch, lambda spec: tokens_of(oracle, spec.settings, block_length))
    (section,) = reference.compare_with_reference(workload, POLICIES)
    decoders = ["reference", "engine, 1 at once", "engine, 2 at once"]
    assert [row["decoder"] for row in section.rows] == decoders * 2
    per_token = [row["NFE/token"] for row in section.rows if row["decoder"] == "reference"]
    assert all(isinstance(forwards, float) and 0.1 < forwards < 1.2 for forwards in per_token)
    give(monkeypatch, lambda spec: [[9, *each[1:]] for each in tokens_of(oracle, spec.settings, block_length)])
    with pytest.raises(UnequalTokensError, match="static 4: the engine's tokens differ from the reference's, 1 at"):
        reference.compare_with_reference(workload, POLICIES)
