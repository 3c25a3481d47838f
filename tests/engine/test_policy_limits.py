"""What a request may not ask for beside its policy, and the options of policies in torch code as workers have them."""

import math
from dataclasses import replace
from importlib.metadata import EntryPoint
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.sampling_params import SamplingParams

from vllm_dllm.config import DllmConfig, RequestOptions, parse_server_settings
from vllm_dllm.engine import configs, policy_limits
from vllm_dllm.engine.policy_limits import refuse_beside_policy, refuse_of_family, refuse_structure
from vllm_dllm.engine.refusals import RequestError
from vllm_dllm.engine.request import resolve_params
from vllm_dllm.errors import ConfigError
from vllm_dllm.models.interface import FAMILIES, ModelFamily
from vllm_dllm.state.request_params import RequestParams
from vllm_dllm.unmask import registry
from vllm_dllm.unmask.registry import BUILT_IN, NATIVE, changes_tokens, needs_file, torch_policy
from vllm_dllm.unmask.schedule import UnmaskRules
from vllm_dllm.unmask.torch_policy import Decision, TorchPolicy

EOS = 7
NONE = RequestOptions()


def resolve(settings: DllmConfig, **options: Any) -> RequestParams:
    params = SamplingParams(max_tokens=20, extra_args={f"dllm_{name}": value for name, value in options.items()})
    rules = UnmaskRules(eos_id=EOS)
    return resolve_params(params, request_id="a", prompt_len=10, settings=settings, rules=rules, max_model_len=100)


def test_a_policys_parameters_are_the_requests_the_servers_or_published() -> None:
    settings = parse_server_settings({"policy": "local_leap", "local_leap_relaxed": 0.5, "block_length": 8})
    served = resolve(settings)
    assert (served.own_policy, served.own_values, served.request_id) == ("local_leap", (0.5, 4.0), "a")
    asked = resolve(settings, local_leap_radius=2, threshold=0.6)
    assert (asked.own_values, asked.threshold) == ((0.5, 2.0), 0.6)
    other = resolve(settings, policy="saber")
    assert (other.own_policy, other.own_values) == ("saber", (2.0,))
    native = resolve(settings, policy="threshold")
    assert (native.own_policy, native.own_values) == (None, ())


def test_a_policy_that_takes_tokens_back_takes_no_draws_words_or_structure() -> None:
    changing = {"saber", "rcr", "remdm", "editing", "indel", "eotp", "learn2pd_eotp"}
    for policy in changing:
        refuse_beside_policy(SamplingParams(temperature=0), policy, NONE)
        with pytest.raises(
            RequestError, match=rf"temperature is 0\.5, but the request's policy '{policy}' takes tokens"
        ):
            refuse_beside_policy(SamplingParams(temperature=0.5), policy, NONE)
        with pytest.raises(RequestError, match=r"bad_words is \['no'\].* allowed is none; remove it"):
            refuse_beside_policy(SamplingParams(temperature=0, bad_words=["no"]), policy, NONE)
        with pytest.raises(RequestError, match=rf"structured_outputs is set, .* '{policy}' changes tokens"):
            refuse_structure(policy, RequestOptions())
    assert {name for name in (*NATIVE, *BUILT_IN) if changes_tokens(name)} == changing
    for policy in {*NATIVE, *BUILT_IN} - changing:
        refuse_structure(policy, RequestOptions())
        refuse_beside_policy(SamplingParams(temperature=0.5, bad_words=["no"]), policy, NONE)


@pytest.mark.parametrize("name", ["allowed_token_ids", "min_tokens", "dllm_logits_eos_inf"])
def test_a_users_policy_that_writes_any_token_takes_none_that_is_forbidden(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changing = TorchPolicy(lambda seen, _: Decision(seen.canvas), tokens_change=True)
    users = {"mine": changing, "grows": replace(changing, tokens_change=False)}
    monkeypatch.setattr(policy_limits, "is_users", lambda policy: policy in users)
    monkeypatch.setattr(
        policy_limits,
        "changes_tokens",
        lambda policy: users[policy].tokens_change if policy in users else changes_tokens(policy),
    )
    own: dict[str, Any] = {"allowed_token_ids": {"allowed_token_ids": [3]}, "min_tokens": {"min_tokens": 2}}
    params = SamplingParams(temperature=0, max_tokens=9, **own.get(name, {}))
    options = RequestOptions(logits_eos_inf=name == "dllm_logits_eos_inf" or None)
    with pytest.raises(RequestError, match=rf"{name} is .*'mine', a user's, may write any token; allowed is .*; rem"):
        refuse_beside_policy(params, "mine", options)
    refuse_beside_policy(SamplingParams(temperature=0), "mine", NONE)
    for policy in ("grows", "saber", "editing"):
        refuse_beside_policy(params, policy, options)


def test_where_a_blocks_first_position_has_no_row_of_its_own_nobody_looks_at_it_again() -> None:
    refused = {
        family.architecture: {name for name in (*NATIVE, *BUILT_IN) if is_refused(name, family)} for family in FAMILIES
    }
    changing = {"saber", "rcr", "remdm", "editing", "indel", "eotp", "learn2pd_eotp"}
    looking = {name for name in BUILT_IN if needs_file(name) or torch_policy(name).asks_known}
    stored = {family.architecture: family.logit_shift for family in FAMILIES if family.stores_alone}
    assert sorted(stored.values()) == [False, True]  # Nemotron, Fast-dLLM v2
    for architecture, found in refused.items():
        is_shifted = stored.get(architecture)
        assert found == (set() if is_shifted is None else changing | looking if is_shifted else changing)


def is_refused(policy: str, family: ModelFamily) -> bool:
    try:
        refuse_of_family(policy, family)
    except RequestError as error:
        return str(error).startswith(f"dllm_policy is {policy!r}, which ")
    return False


def test_a_users_policy_that_cannot_be_loaded_keeps_any_server_from_starting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only one whose settings name it: a request with an unknown option would load it, and be a 500."""
    broken = EntryPoint("broken", "no_such_module:POLICY", registry.GROUP)
    monkeypatch.setattr(registry, "user_policies", lambda: {"broken": broken})
    model = SimpleNamespace(architectures=["LLaDAModelLM"], hf_config=SimpleNamespace())
    config: Any = SimpleNamespace(model_config=model, additional_config={"dllm": {"block_length": 8}})
    with pytest.raises(
        ConfigError, match=r"'broken' .* cannot be loaded \(ModuleNotFoundError: .*mend or uninstall it"
    ):
        configs.parse(config)


def test_eos_may_be_left_out() -> None:
    assert resolve(DllmConfig(), logits_eos_inf=True).edits.bias == ((EOS, -math.inf),)
    assert resolve(DllmConfig()).edits.bias == ()
    never = RequestOptions(logits_eos_inf=True)
    with pytest.raises(RequestError, match="dllm_logits_eos_inf is true beside structured output"):
        refuse_structure("static", never)
