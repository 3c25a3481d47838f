"""What commands take from a checkpoint's configuration where the user gives no option."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.models.in_process import LLADA22
from vllm_dllm.cli.main import app
from vllm_dllm.cli.server_settings import given_parameters, given_settings, server_settings
from vllm_dllm.config import parse_server_settings
from vllm_dllm.errors import ConfigError


def checkpoint(folder: Path, **config: object) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"architectures": ["LLaDAModelLM"]}, (32, "static", "dual", 0.9)),
        ({"architectures": ["DreamModel"]}, (32, "entropy", "dual", 0.9)),
        ({"architectures": ["SDARForCausalLM"]}, (4, "dynamic", "block_causal", 0.85)),
        ({"architectures": ["SDARForCausalLM"], "block_size": 16}, (16, "dynamic", "block_causal", 0.85)),
        ({"architectures": ["SDARMoeForCausalLM"]}, (4, "dynamic", "block_causal", 0.85)),
        ({"architectures": ["LLaDAMoEModelLM"]}, (32, "static", "dual", 0.9)),
        (
            {"architectures": ["LlamaForCausalLM"], "auto_map": {"AutoModel": "m.SeedDiffcoderForCausalLM"}},
            (4, "static", "block_causal", 0.9),
        ),
    ],
)
def test_the_model_decides_what_is_not_given(
    config: dict[str, object], expected: tuple[object, ...], tmp_path: Path
) -> None:
    found = server_settings(checkpoint(tmp_path, **config), {})
    assert (found.block_length, found.policy, found.kv_policy, found.threshold) == expected


def test_llada22_says_its_policy_and_its_tokens(tmp_path: Path) -> None:
    found = server_settings(checkpoint(tmp_path, **LLADA22), {})
    assert (found.block_length, found.policy, found.threshold) == (4, "indel", 0.5)
    assert found.parameters == {"indel_delete": 6, "indel_split": 7}
    plain = {name: value for name, value in LLADA22.items() if name not in ("delete_token_id", "split_token_id")}
    assert server_settings(checkpoint(tmp_path, **plain), {}).policy == "dynamic"
    with pytest.raises(ConfigError, match=r"delete_token_id and split_token_id .* are 6 and 6"):
        server_settings(checkpoint(tmp_path, **LLADA22 | {"split_token_id": 6}), {})


def test_an_option_wins(tmp_path: Path) -> None:
    model = checkpoint(tmp_path, architectures=["SDARForCausalLM"], block_size=16)
    given = given_settings("static", 8, None, None, None, None, 0.5, None)
    found = server_settings(model, given)
    assert (found.block_length, found.policy, found.alg_temp, found.threshold) == (8, "static", 0.5, 0.85)


def test_the_numbers_of_credit_are_one_option(tmp_path: Path) -> None:
    given = given_settings("credit", None, None, None, None, "1.5,0.5,1", None, None)
    found = server_settings(checkpoint(tmp_path, architectures=["LLaDAModelLM"]), given)
    assert (found.credit_alpha, found.credit_beta, found.credit_gamma) == (1.5, 0.5, 1.0)
    for wrong in ("1.5,0.5", "a,b,c"):
        refused = CliRunner(env={"COLUMNS": "300", "TERM": "dumb"}).invoke(
            app, ["graph", "check", "g", "--credit", wrong]
        )
        assert refused.exit_code == 2
        assert f"'{wrong}', allowed are three numbers with commas between them" in refused.output


def test_a_familys_name_of_a_policy_is_taken(tmp_path: Path) -> None:
    model = checkpoint(tmp_path, architectures=["LLaDAModelLM"])
    assert server_settings(model, {"policy": "low_confidence_dynamic"}).policy == "dynamic"
    graph = ["graph", "check", str(tmp_path / "gone.json"), "--policy"]
    assert "gone.json" in CliRunner(env={"COLUMNS": "300", "TERM": "dumb"}).invoke(app, [*graph, "maskgit_plus"]).output
    refused = CliRunner(env={"COLUMNS": "300", "TERM": "dumb"}).invoke(app, [*graph, "best"])
    assert refused.exit_code == 2
    assert "'best', allowed are static, random" in refused.output


def test_what_cannot_be_served_is_refused(tmp_path: Path) -> None:
    model = checkpoint(tmp_path, architectures=["LlamaForCausalLM"])
    with pytest.raises(ConfigError, match=r"has architectures \['LlamaForCausalLM'\], allowed are LLaDAModelLM, Dream"):
        server_settings(model, {})
    with pytest.raises(ConfigError, match=r"model .* is not there: no such folder; give the name or the path"):
        server_settings(str(tmp_path / "missing"), {})
    with pytest.raises(ConfigError, match="--block-length is 0, allowed are whole numbers from 1 to 1024"):
        server_settings(checkpoint(tmp_path, architectures=["DreamModel"]), {"block_length": 0})


def test_a_policys_net_is_given_as_its_parameters_are() -> None:
    given = given_parameters(["learn2pd_file=net.safetensors", "local_leap_radius=3"])
    assert given == {"learn2pd_file": "net.safetensors", "local_leap_radius": 3.0}
    assert parse_server_settings(given).files == {"learn2pd_file": "net.safetensors"}
