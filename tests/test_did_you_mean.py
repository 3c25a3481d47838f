"""Typos are refused with the word that was meant, wherever a user writes a name of ours; names of others pass."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from vllm_dllm.additional_config import settings_in
from vllm_dllm.calibrate.prompts import read_prompts
from vllm_dllm.cli.server_settings import _policy
from vllm_dllm.config import parse_request_options, parse_server_settings
from vllm_dllm.draft.graph_file import default_graph, dump_graph, load_graph, parse_graph
from vllm_dllm.errors import ConfigError, nearest
from vllm_dllm.spiffy_config import parse_spiffy, read_speculative_config, to_json_object

GRAPH: dict[str, Any] = json.loads(dump_graph(default_graph("threshold")))
PROVENANCE: dict[str, Any] = GRAPH["provenance"]


def spiffy(**fields: object) -> object:
    return to_json_object(parse_spiffy({"method": "spiffy", **fields}))


@pytest.mark.parametrize(
    ("use", "given", "meant"),
    [
        (settings_in, {"dlm": {}}, "additional_config.dllm"),
        (settings_in, {"ddlm": {}}, "additional_config.dllm"),
        (settings_in, {"DLLM": {}}, "additional_config.dllm"),
        (settings_in, {"vllm-dllm": {}}, "additional_config.dllm"),
        (settings_in, {"dllm.policy": "static"}, "additional_config.dllm"),
        (settings_in, {"dllm": {}, "block_length": 8}, "additional_config.dllm.block_length"),
        (parse_server_settings, {"block_lenght": 8}, "additional_config.dllm.block_length"),
        (parse_server_settings, {"kv-policy": "dual"}, "additional_config.dllm.kv_policy"),
        (parse_server_settings, {"policy": "theshold"}, "threshold"),
        (parse_server_settings, {"policy": "low-confidence"}, "low_confidence"),
        (parse_server_settings, {"kv_policy": "Dual"}, "dual"),
        (parse_server_settings, {"attention": "flash_infer"}, "flashinfer"),
        (parse_request_options, {"dllm_threshhold": 0.5}, "dllm_threshold"),
        (parse_request_options, {"dlm_threshold": 0.5}, "dllm_threshold"),
        (parse_request_options, {"dllm-policy": "static"}, "dllm_policy"),
        (parse_request_options, {"policy": "static"}, "dllm_policy"),
        (parse_request_options, {"dllm_policy": "entropy_bound"}, "entropy_bounded"),
        (parse_spiffy, {"method": "spify"}, "spiffy"),
        (parse_spiffy, {"method": "spiffy", "draftgraph": "a"}, "speculative_config.draft_graph"),
        (parse_spiffy, {"method": "spiffy", "budget": "Auto"}, "auto"),
        (parse_spiffy, {"method": "spiffy", "exactness": "exat"}, "exact"),
        (parse_graph, GRAPH | {"node": []}, "nodes"),
        (parse_graph, GRAPH | {"nodes": [{"formulas": [[0, 0]]}]}, "formula"),
        (parse_graph, GRAPH | {"provenance": PROVENANCE | {"familly": "llada"}}, "family"),
    ],
)
def test_a_typo_is_refused_with_what_was_meant(use: Callable[[Any], object], given: object, meant: str) -> None:
    with pytest.raises(ConfigError, match=r"; did you mean '[\w.]+'\?$") as refused:
        use(given)
    assert str(refused.value).endswith(f"did you mean '{meant}'?")


@pytest.mark.parametrize(
    ("use", "given"),
    [
        (settings_in, {"ascend_scheduler_config": {"enabled": True}, "refresh": True, "graph": 1, "model": 2, 3: 4}),
        (parse_request_options, {"kv_transfer_params": {}, "policy_id": 3, "max_threshold": 1, "x": 1, "": 2}),
    ],
)
def test_names_of_others_pass(use: Callable[[Any], object], given: object) -> None:
    assert use(given) == use({})


def test_files_and_words_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("graph.json").write_text("{}")
    Path("spiffy.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"grpah.json is not a file; did you mean 'graph.json'\?"):
        load_graph("grpah.json")
    with pytest.raises(ConfigError, match=r"defualt is not a file; did you mean 'default'\?"):
        spiffy(draft_graph="defualt")
    with pytest.raises(ConfigError, match=r"'spify.json', but there is no such file.* did you mean 'spiffy.json'\?"):
        read_speculative_config("spify.json")
    with pytest.raises(ConfigError, match=r'give \{"method": "spiffy"\} or --spec-method spiffy$'):
        read_speculative_config("spiffy")
    Path("null.json").write_text("")
    Path("graphs").mkdir()
    for missing in ("nosuch.json", "graphz", "graph/"):
        with pytest.raises(ConfigError, match="is not a file; give the path of a graph file"):
            load_graph(missing)
    Path("prompts.jsonl").write_text('{"promt": "a"}\n')
    with pytest.raises(ConfigError, match=r"did you mean 'prompt'\?"):
        read_prompts(Path("prompts.jsonl"), 1)


def test_what_vllm_calls_it_is_told_what_it_is_called_here() -> None:
    with pytest.raises(ConfigError, match=r"num_speculative_tokens is 3, .* give speculative_config.budget for how"):
        parse_spiffy({"method": "spiffy", "num_speculative_tokens": 3})


def test_names_of_policies_on_the_command_line() -> None:
    with pytest.raises(typer.BadParameter, match=r"'statik', allowed are .*; did you mean 'static'\?"):
        _policy("statik")


def test_what_was_given_is_never_suggested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("graphs").mkdir()
    for given in ("graphs", "graphs/", str(tmp_path / "graphs")):
        with pytest.raises(ConfigError, match=r"graphs/? is a folder; give the path of a graph file"):
            spiffy(draft_graph=given)
        with pytest.raises(ConfigError, match=r"but this is a folder; allowed are an object, .*; correct it$"):
            read_speculative_config(given)
    for given in ("/dev/null", ""):
        with pytest.raises(ConfigError, match="is not a file; give the path of a graph file"):
            spiffy(draft_graph=given)
    with pytest.raises(ConfigError, match="method is None, allowed are 'spiffy'; give one of these"):
        parse_spiffy({"method": None})


@pytest.mark.parametrize(
    ("given", "meant"),
    [("greedy", None), ("best", None), (None, None), ("static", None), ("Static ", "static"), ("Static", "static")],
)
def test_what_is_like_nothing_gets_no_suggestion(given: object, meant: str | None) -> None:
    assert nearest(given, ["static", "threshold", "entropy"]) == meant
