"""Files of rankers: what is written is what is read; what is wrong with one is said at start, and costs no request."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save

from tests.draft.example_graph import PROVENANCE
from vllm_dllm.config import DllmConfig, InvalidOptionError
from vllm_dllm.draft.graph_schema import ModelShape
from vllm_dllm.draft.ranker import WIDTH, OrderRanker
from vllm_dllm.draft.ranker_file import (
    FORMAT,
    MAX_FILE_BYTES,
    RankerFile,
    check_ranker,
    load_ranker,
    save_ranker,
)
from vllm_dllm.draft.ranker_shape import weight_shapes
from vllm_dllm.draft.readiness import Readiness
from vllm_dllm.errors import ConfigError
from vllm_dllm.spiffy_config import parse_spiffy, read_speculative_config, spiffy_settings, to_json_object

READINESS = Readiness(1.5, (0.25, -0.5), -1.0)
SETTINGS = PROVENANCE.settings
Weights = dict[str, np.ndarray]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_ranker(RankerFile(OrderRanker().weights, READINESS, PROVENANCE), tmp_path / "ranker.safetensors")
    return tmp_path / "ranker.safetensors"


def test_what_is_written_is_read(path: Path) -> None:
    file = load_ranker(path)
    assert (file.readiness, file.provenance, file.source) == (READINESS, PROVENANCE, str(path))
    torch.manual_seed(0)
    wanted = OrderRanker().state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in wanted.items()} == weight_shapes(WIDTH)
    for name, tensor in OrderRanker.of(file.weights).state_dict().items():
        assert torch.equal(tensor, wanted[name])


def put(name: str, value: float) -> Callable[[Weights], object]:
    return lambda weights: weights[name].__setitem__(0, value)


WRONG: dict[str, tuple[Callable[[Weights], object], str]] = {
    "nan": (put("mix.bias", np.nan), "mix.bias has values that are no finite numbers"),
    "infinite": (put("read.bias", np.inf), "read.bias has values that are no finite numbers"),
    "type": (lambda w: w.update({"mix.bias": w["mix.bias"].astype(np.float64)}), "mix.bias is float64, allowed is flo"),
    "missing": (lambda w: w.pop("write.bias"), "allowed are {'read.weight': (32, 50)"),
    "more": (lambda w: w.update(extra=w["mix.bias"]), "'extra': (32,)"),
    "shape": (lambda w: w.update({"mix.weight": w["mix.weight"][:, 1:].copy()}), "'mix.weight': (32, 159)"),
    "width": (lambda w: w.update({"read.bias": np.zeros(0, np.float32)}), "of a width of 1 to 256"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_weights_are_refused(wrong: str, path: Path) -> None:
    change, message = WRONG[wrong]
    weights = {name: array.copy() for name, array in load_ranker(path).weights.items()}
    change(weights)
    save_ranker(RankerFile(weights, READINESS, PROVENANCE), path)
    with pytest.raises(ConfigError) as raised:
        load_ranker(path)
    assert message in str(raised.value)
    assert str(path) in str(raised.value)


METADATA = {"format": FORMAT, "readiness": '{"slope": 1, "near": [0, 0]}', "provenance": PROVENANCE.model_dump_json()}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a safetensors file"),
        (b"\xff" * 100, "is not a safetensors file"),
        (b" " * (MAX_FILE_BYTES + 1), f"is larger than {MAX_FILE_BYTES} bytes"),
        ({}, f"has the format None, allowed is '{FORMAT}'"),
        (METADATA | {"format": "2"}, "has the format '2'"),
        (METADATA | {"readiness": '{"slope": "x"}'}, "does not say what it was calibrated for"),
        ({"format": FORMAT, "readiness": METADATA["readiness"]}, "does not say what it was calibrated for"),
    ],
)
def test_other_files_are_refused(content: bytes | dict[str, str], message: str, path: Path) -> None:
    if isinstance(content, dict):
        content = save(dict(load_ranker(path).weights), content)
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"ranker .*ranker.safetensors {message}"):
        load_ranker(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for missing in (tmp_path / "none", tmp_path, ""):
        with pytest.raises(ConfigError, match=r"is not a file; .*'vllm-dllm calibrate --ranker' wrote"):
            load_ranker(missing)


def test_a_ranker_of_another_server_warns(path: Path) -> None:
    file = load_ranker(path)
    assert check_ranker(file, SETTINGS, READINESS, family="llada") == []
    other = DllmConfig(block_length=8, policy="static", kv_policy="dual")
    shape = ModelShape(vocab_size=9, hidden_size=9, num_hidden_layers=9)
    text = "\n".join(check_ranker(file, other, Readiness(), model="m", family="dream", shape=shape))
    for part in (
        "for a ranker of this server run: vllm-dllm calibrate m",
        "block_length 16 but",
        "policy 'threshold' but",
        "family 'llada' but",
        "not calibrated together with",
    ):
        assert part in text


def test_a_server_takes_a_ranker(path: Path, tmp_path: Path) -> None:
    """Of a file the path counts from there; other processes are told where it is and read it again."""
    (tmp_path / "spiffy.json").write_text(json.dumps({"method": "spiffy", "ranker": path.name}))
    given = read_speculative_config(tmp_path / "spiffy.json")
    assert isinstance(given, dict)
    assert given == {"method": "spiffy", "ranker": str(path)}
    text = json.dumps(to_json_object(parse_spiffy(given)))
    found = spiffy_settings(text, SETTINGS, "models/llada-tiny", "llada")
    assert found.ranker is not None
    assert found.graph.readiness == READINESS
    assert any("not calibrated together" in warning for warning in found.warnings)
    without = spiffy_settings(
        json.dumps(to_json_object(parse_spiffy({"method": "spiffy"}))), SETTINGS, "models/llada-tiny", "llada"
    )
    assert without.ranker is None
    with pytest.raises(InvalidOptionError, match=r"speculative_config\.ranker is 5, allowed are null and the path"):
        parse_spiffy({"method": "spiffy", "ranker": 5})
    with pytest.raises(ConfigError, match="is not a file"):
        to_json_object(parse_spiffy({"method": "spiffy", "ranker": str(tmp_path / "rankr.safetensors")}))


def test_windows_have_no_ranker(path: Path) -> None:
    text = json.dumps(to_json_object(parse_spiffy({"method": "spiffy", "ranker": str(path)})))
    with pytest.raises(ConfigError, match=r"speculative_config.ranker is .* but the drafts of this model are a chain"):
        spiffy_settings(text, DllmConfig(kv_policy="window", block_length=16), "models/ours", "wedlm")
