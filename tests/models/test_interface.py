"""What the families say of decoding, and which settings they take."""

import re

import pytest

from vllm_dllm.config import DllmConfig, InvalidOptionError, parse_server_settings
from vllm_dllm.models.interface import FAMILIES, FAMILY_BY_ARCHITECTURE, ModelFamily, check_family
from vllm_dllm.names import BIDIRECTIONAL, KvPolicyName


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_the_published_settings_are_allowed(family: ModelFamily) -> None:
    for block_size in (None, 8):
        settings = parse_server_settings({}, defaults=family.settings(block_size))
        check_family(settings, family)
        assert block_size is None or settings.block_length == block_size


@pytest.mark.parametrize(
    ("architecture", "kv_policy", "parts"),
    [
        (
            "SDARForCausalLM",
            "dual",
            "is 'dual', but SDARForCausalLM sees nothing behind a block|allowed are 'block_causal'",
        ),
        *(
            ("SDARForCausalLM", name, f"is {name!r}, but SDARForCausalLM sees nothing behind a block")
            for name in BIDIRECTIONAL
        ),
        ("DreamModel", "block_causal", "but DreamModel sees what follows a block|allowed are 'dual' and 'prefix'"),
        ("LLaDAModelLM", "block_causal", "but LLaDAModelLM sees what follows a block"),
    ],
)
def test_a_kv_policy_for_other_attention_is_refused(architecture: str, kv_policy: KvPolicyName, parts: str) -> None:
    with pytest.raises(InvalidOptionError) as refused:
        check_family(DllmConfig(kv_policy=kv_policy), FAMILY_BY_ARCHITECTURE[architecture])
    assert all(re.search(re.escape(part), str(refused.value)) for part in parts.split("|")), refused.value
