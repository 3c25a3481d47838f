"""The nets of policies: converted, loaded, and refused where they cannot serve."""

import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.unmask.torch_policies import net, unmasking_net
from vllm_dllm.config import InvalidOptionError, RequestOptions, parse_request_options, parse_server_settings
from vllm_dllm.errors import ConfigError
from vllm_dllm.request_checks import check_policy_options
from vllm_dllm.state.policy_weights import load_weights

CPU = torch.device("cpu")
CONVERT = runpy.run_path(str(Path(__file__).parents[2] / "examples/convert_policy.py"))["convert"]


def test_a_published_net_is_converted_and_loaded(tmp_path: Path) -> None:
    source, target = tmp_path / "layer_2_flan.pth", tmp_path / "net.safetensors"
    torch.save({name: its.bfloat16() for name, its in net(4).items()}, source)
    CONVERT(source, target)
    loaded = load_weights("learn2pd_file", str(target), 4, CPU)
    assert {name: its.bfloat16().tolist() for name, its in loaded.items()} == {
        name: its.bfloat16().tolist() for name, its in net(4).items()
    }
    torch.save({"other": torch.zeros(1)}, source)
    with pytest.raises(ValueError, match=r"has the tensors \['other'\], allowed are \['linear1.bias'"):
        CONVERT(source, target)


def test_a_file_that_cannot_serve_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    with pytest.raises(ConfigError, match=r"learn2pd_file is '.*net\.safetensors', which is no file"):
        load_weights("learn2pd_file", str(path), 4, CPU)
    path.write_bytes(b"no net")
    with pytest.raises(ConfigError, match=r"which cannot be read .*; convert it with examples/convert_policy\.py"):
        load_weights("learn2pd_file", str(path), 4, CPU)
    save_file(net(4), path)
    with pytest.raises(ConfigError, match=r"allowed for blocks of 8 are .*\(8, 8\).*trained for this block_length"):
        load_weights("learn2pd_file", str(path), 8, CPU)


def test_a_trained_unmasking_net_is_loaded_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(unmasking_net(), path)
    loaded = load_weights("dit_confidence_file", str(path), 32, CPU)
    assert loaded["base_policy.transformer_blocks.0.ada_conditioning.weight"].shape == (768, 128)
    of_other_size = {name: its[:64] for name, its in unmasking_net().items()}
    save_file(of_other_size, path)
    with pytest.raises(ConfigError, match=r"dit_confidence_file is .* allowed for blocks of 32 are .*\(768, 128\)"):
        load_weights("dit_confidence_file", str(path), 32, CPU)


def test_policies_of_one_net_share_its_file() -> None:
    with pytest.raises(
        InvalidOptionError, match="'learn2pd_eotp', which looks at a net; give its file as learn2pd_file"
    ):
        parse_server_settings({"policy": "learn2pd_eotp"})
    served = parse_server_settings({"learn2pd_file": "net.safetensors"})
    for policy in ("learn2pd", "learn2pd_eotp"):
        check_policy_options(RequestOptions(policy=policy), served)
    with pytest.raises(InvalidOptionError, match="'dit_confidence', but the server has no dit_confidence_file"):
        check_policy_options(RequestOptions(policy="dit_confidence"), served)


def test_the_policy_needs_the_servers_file() -> None:
    with pytest.raises(
        InvalidOptionError, match="policy is 'learn2pd', which looks at a net; give its file as learn2pd"
    ):
        parse_server_settings({"policy": "learn2pd"})
    with pytest.raises(InvalidOptionError, match="learn2pd_file is 3, allowed are paths of safetensors files"):
        parse_server_settings({"learn2pd_file": 3})
    own = RequestOptions(policy="learn2pd")
    with pytest.raises(InvalidOptionError, match="dllm_policy is 'learn2pd', but the server has no learn2pd_file"):
        check_policy_options(own, parse_server_settings({}))
    served = parse_server_settings({"learn2pd_file": "net.safetensors"})
    assert dict(served.files) == {"learn2pd_file": "net.safetensors"}
    check_policy_options(own, served)
    with pytest.raises(InvalidOptionError, match="dllm_learn2pd_file is not known"):
        parse_request_options({"dllm_learn2pd_file": "net.safetensors"})
