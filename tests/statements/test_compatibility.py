"""What drafts may do beside each decoder that is served: each policy is in a row, and its drafts are called exact.

That drafts change no token is shown of each by `test_trained.py` and `tests/e2e/test_torch_policies.py`; which KV
policies are exact, near or refused says `tests/test_spiffy_config.py`.
"""

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from vllm_dllm.config import DllmConfig
from vllm_dllm.errors import ConfigError
from vllm_dllm.unmask.registry import BUILT_IN, NATIVE, changes_tokens, torch_policy

PAGE = Path(__file__).parents[2] / "docs/policies.md"

ROWS: dict[str, dict[str, set[str]]] = {
    "D0": {
        "LLaDA, Dream and SDAR": {"static", "margin", "entropy", "sequential", "dynamic", "entropy_bounded"},
        "Fast-dLLM, LocalLeap, dParallel, dInfer": {
            *("threshold", "factor", "local_leap", "entropy_threshold", "hierarchy"),
        },
        "LLaDA's flag": {"confidence_eos_eot_inf"},
        "Learn2PD": {"learn2pd"},
    },
    "D1": {
        "CreditDecoding": {"credit"},
        "EOSER and ASS": {"eoser", "ass", "eoser_ass"},
        "windows: DCD, AdaBlock": {"deferred", "adablock"},
        "CCD": {"ccd"},
        "Prophet": {"prophet"},
    },
    "D1, tokens change": {
        "EoTP": {"eotp", "learn2pd_eotp"},
        "LLaDA2.1, LLaDA2.2": {"editing", "indel"},
        "Saber, RCR, ReMDM": {"saber", "rcr", "remdm"},
    },
    "D2, keyed noise": {
        "drawn orders": {"random", "origin"},
        "the learned unmasking policy": {"dit_confidence"},
    },
}
"""Classes (docs/policies.md) -> decoders -> policies."""


def test_each_policy_of_the_registry_is_in_a_row() -> None:
    listed = [policy for rows in ROWS.values() for policies in rows.values() for policy in policies]
    assert sorted(listed) == sorted((*NATIVE, *BUILT_IN))


def test_the_page_has_each_in_its_class_and_calls_its_drafts_exact() -> None:
    said = {
        name: (cells[-3].strip(), cells[-2].strip())
        for cells in (
            line.split("|") for line in PAGE.read_text().splitlines() if re.match(r"\| `\w+`.* exact \|$", line)
        )
        for name in re.findall(r"`(\w+)`", cells[1])
    }
    expected = {policy: (kind, "exact") for kind, rows in ROWS.items() for own in rows.values() for policy in own}
    assert said == expected


def test_what_is_kept_and_what_changes_is_what_the_class_says() -> None:
    """D0 keeps nothing of a block; where tokens change, drafts come true in steps that only add to the canvas."""
    for kind, rows in ROWS.items():
        for policy in set().union(*rows.values()):
            assert changes_tokens(policy) == kind.endswith("tokens change"), policy
            if policy in BUILT_IN and kind == "D0":
                assert not torch_policy(policy).state, policy


@pytest.mark.parametrize("name", ["iter_smooth", "guided_diffusion", "recurrent"])
def test_what_drafts_could_not_follow_is_not_served(name: str) -> None:
    with pytest.raises((ConfigError, ValidationError), match=name):
        DllmConfig(policy=name)
