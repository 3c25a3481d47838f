"""`--speculative-config` in all its forms, through vLLM's parser and `EngineArgs`; no engine is started."""

import argparse
import copy
import json
import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_dllm import plugin
from vllm_dllm.draft.graph_file import default_graph, dump_graph
from vllm_dllm.engine.step_sizes import captured_blocks
from vllm_dllm.errors import ConfigError

CHECKPOINT = Path(__file__).parents[2] / "examples/tiny_llada/checkpoint"
GIVEN = {"method": "spiffy", "draft_graph": "graph.json", "budget": 3}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with the files that a user has."""
    plugin.register()
    monkeypatch.chdir(tmp_path)
    Path("graph.json").write_text(dump_graph(default_graph("factor")))
    Path("spiffy.json").write_text(json.dumps(GIVEN))
    Path("path.yaml").write_text("speculative-config: spiffy.json\n")
    Path("mapping.yaml").write_text("speculative-config:\n  method: spiffy\n  draft_graph: graph.json\n  budget: 3\n")
    Path("other.json").write_text('{"method": "ngram", "num_speculative_tokens": 2}')
    return tmp_path


@pytest.fixture
def parser(capsys: pytest.CaptureFixture[str]) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return AsyncEngineArgs.add_cli_args(FlexibleArgumentParser(prog="vllm serve"))


def engine_config(**changes: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    values = {"model": str(CHECKPOINT), "max_model_len": 128, "max_num_seqs": 16, "load_format": "dummy"}
    return EngineArgs(**(values | changes)).create_engine_config()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--speculative-config", "spiffy.json"],
        ["--speculative-config=spiffy.json"],
        ["--speculative_config", "spiffy.json"],
        ["-sc", "spiffy.json"],
        ["-sc=spiffy.json"],
        ["--speculative-config", json.dumps(GIVEN)],
        ["-sc", json.dumps(GIVEN)],
        [f"--speculative-config.{key}={value}" for key, value in GIVEN.items()],
        [word for key, value in GIVEN.items() for word in (f"-sc.{key.replace('_', '-')}", str(value))],
        ["--config", "path.yaml"],
        ["--config", "mapping.yaml"],
        ["--spec-method", "spiffy", "--speculative-config", '{"draft-graph": "graph.json", "budget": 3}'],
    ],
)
def test_every_form_gives_the_same_settings(parser: Any, arguments: list[str]) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs

    from vllm_dllm.engine.configs import spiffy_of

    arguments = [*arguments, "--model", str(CHECKPOINT), "--max-model-len", "128", "--load-format", "dummy"]
    config = AsyncEngineArgs.from_cli_args(parser.parse_args(arguments)).create_engine_config()
    found = spiffy_of(config)
    assert found is not None
    assert found.graph == default_graph("factor").graph
    assert found.budget == 3
    assert config.speculative_config is None


@pytest.mark.parametrize("value", [GIVEN, "spiffy.json", Path("spiffy.json"), json.dumps(GIVEN)])
def test_python_forms_are_used_again_and_left_unchanged(value: Any) -> None:
    from vllm.engine.arg_utils import EngineArgs

    from vllm_dllm.engine.configs import spiffy_of

    before, additional = copy.deepcopy(value), {"dllm": {"block_length": 16}}
    args = EngineArgs(
        str(CHECKPOINT), max_model_len=128, load_format="dummy", speculative_config=value, additional_config=additional
    )
    first, second = args.create_engine_config(), args.create_engine_config()
    assert spiffy_of(first) is spiffy_of(second) is not None
    assert args.speculative_config == value == before
    assert additional == {"dllm": {"block_length": 16}}
    assert json.loads(json.dumps(first.additional_config)) == second.additional_config
    assert first.diffusion_config.canvas_length == 16 + 3


def test_a_form_that_cannot_be_read_is_an_error_of_the_option(parser: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for value, reason in [("gone.json", "there is no such file"), (".", "this is a folder"), ("{", "")]:
        with pytest.raises(SystemExit):
            parser.parse_args(["--speculative-config", value])
        message = capsys.readouterr().err
        assert "error: argument --speculative-config/-sc: " in message
        assert reason in message
    assert "path of a file" not in message  # JSON keeps vLLM's own words
    with pytest.raises(SystemExit):
        parser.parse_args(["--spec-method", "spify"])
    assert "'spify' is not known; did you mean 'spiffy'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("other.json", {"method": "ngram", "num_speculative_tokens": 2}),
        ('{"method": "ngram"}', {"method": "ngram"}),
        ("None", None),
        ("", None),
        ("null", None),
    ],
)
def test_other_methods_are_read_as_before(parser: Any, value: str, expected: object) -> None:
    assert parser.parse_args(["--speculative-config", value]).speculative_config == expected


def test_help_stays_intact(parser: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "VllmConfig" in parser.format_help()
    monkeypatch.setattr(type(parser), "_search_keyword", "speculative-config")
    found = parser.format_help()
    assert "--speculative-config" in found
    assert "-sc" in found
    monkeypatch.setattr(type(parser), "_search_keyword", "spec-method")
    found = parser.format_help()
    assert "spiffy" in found
    assert "ngram" in found
    monkeypatch.setattr(type(parser), "_search_keyword", "all")
    assert "--additional-config" in parser.format_help()


def test_arguments_of_a_parser_are_not_shared() -> None:
    """vLLM caches what its parsers are made of; a second one must not offer the method twice."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    for _ in range(2):
        parser: argparse.ArgumentParser = EngineArgs.add_cli_args(FlexibleArgumentParser())
        choices = parser._option_string_actions["--spec-method"].choices
        assert choices is not None
        assert list(choices).count("spiffy") == 1


OURS, THEIRS = SimpleNamespace(architectures=["LLaDAModelLM"]), SimpleNamespace(architectures=["LlamaForCausalLM"])


def arguments(**values: Any) -> Any:
    names = ("speculative_config", "spec_method", "spec_model", "spec_tokens")
    rest = {"additional_config": {}, "per_request_spec_decode_metrics": "none"}
    return SimpleNamespace(**(dict.fromkeys(names) | rest | values))


@pytest.mark.parametrize(
    ("model", "values", "sentence"),
    [
        (
            THEIRS,
            {"spec_method": "spiffy"},
            "'spiffy', but LlamaForCausalLM is not a diffusion model; allowed are LLaDA",
        ),
        (THEIRS, {"speculative_config": "spiffy.json"}, "LlamaForCausalLM is not a diffusion model"),
        (OURS, {"speculative_config": {"method": "ngram"}}, "method 'ngram'"),
        (OURS, {"speculative_config": {"budget": 3}}, "method None"),
        (OURS, {"speculative_config": {"method": None}}, "; allowed is method 'spiffy'; set it or remove"),
        (OURS, {"speculative_config": {"method": "spify"}}, "did you mean 'spiffy'?"),
        (THEIRS, {"speculative_config": {"method": "Spiffy"}}, "did you mean 'spiffy'?"),
        (THEIRS, {"spec_method": "spify"}, "method is 'spify', which neither vLLM nor vllm-dllm knows"),
        (OURS, {"speculative_config": {"metod": "spiffy"}}, "'metod' is not known, did you mean 'method'?"),
        (
            OURS,
            {"speculative_config": {"method": "spiffy", "draft-graph": "graph.json", "draft_graph": "default"}},
            "speculative_config.draft-graph is 'graph.json' and speculative_config.draft_graph is 'default', but both",
        ),
        (OURS, {"speculative_config": [1]}, "speculative_config is [1]"),
        (OURS, {"speculative_config": GIVEN, "spec_method": "ngram"}, "method 'ngram'"),
        (OURS, {"spec_method": "spiffy", "spec_tokens": 3}, "num_speculative_tokens is 3, but drafts of"),
        (OURS, {"speculative_config": GIVEN | {1: 2}}, "speculative_config.1 is not known"),
    ],
)
def test_what_cannot_be_taken_is_refused(model: Any, values: dict[str, Any], sentence: str) -> None:
    from vllm_dllm.engine.spiffy_arguments import take_spiffy

    with pytest.raises(ConfigError) as refused:
        take_spiffy(arguments(**values), model)
    assert sentence in str(refused.value)


@pytest.mark.parametrize(
    ("model", "values"),
    [
        (THEIRS, {}),
        (OURS, {}),
        (THEIRS, {"speculative_config": {"method": "ngram"}}),
        (THEIRS, {"speculative_config": {"method": "sufix"}}),
    ],
)
def test_everything_else_is_left_to_vllm(model: Any, values: dict[str, Any]) -> None:
    from vllm_dllm.engine.spiffy_arguments import take_spiffy

    args = arguments(**values)
    before = copy.deepcopy(vars(args))
    assert not take_spiffy(args, model)
    assert vars(args) == before


def test_a_path_works_for_other_methods() -> None:
    from vllm_dllm.engine.spiffy_arguments import take_spiffy

    args = arguments(speculative_config=Path("other.json"))
    assert not take_spiffy(args, THEIRS)
    assert args.speculative_config == {"method": "ngram", "num_speculative_tokens": 2}


@pytest.mark.parametrize(
    ("given", "rows"),
    [
        (None, 16 * 32),
        ({"budget": 0}, 16 * 32),
        ({"budget": 3}, 16 * 32 * 4),
        ({"budget": 3, "max_nodes": 3}, 16 * 32 * 4),
        ({"budget": 8}, 2048),
        ({"budget": "auto"}, 2048),
        ({"budget": "auto", "max_nodes": 2}, 16 * 32 * 3),
    ],
)
def test_the_token_budget_holds_drafts_and_the_longest_prompt(given: dict[str, Any] | None, rows: int) -> None:
    from vllm_dllm.engine.configs import spiffy_of

    config = engine_config(
        speculative_config=given and {"method": "spiffy"} | given, max_num_batched_tokens=128, enforce_eager=True
    )
    assert config.scheduler_config.max_num_batched_tokens == rows + 128
    found = spiffy_of(config)
    canvas_length = 32 + found.max_nodes if found else 32
    assert config.diffusion_config.canvas_length == config.model_config.hf_config.canvas_length == canvas_length


def test_a_single_request_may_have_all_its_drafts() -> None:
    config = engine_config(
        speculative_config=GIVEN | {"budget": "auto", "max_nodes": 10},
        max_num_seqs=1,
        max_num_batched_tokens=128,
        additional_config={"dllm": {"block_length": 64}},
    )
    assert config.scheduler_config.max_num_batched_tokens == 64 * 11 + 128


def test_a_fixed_budget_that_does_not_fit_for_all_is_told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level(logging.INFO, "vllm.dllm"):
        engine_config(speculative_config=GIVEN | {"budget": 8}, enforce_eager=True)
    assert "budget 8 is for up to 7 requests at a time; with more, up to max_num_seqs=16" in caplog.text


def test_without_spiffy_nothing_of_it_is_there() -> None:
    from vllm_dllm.engine.configs import spiffy_of

    config = engine_config()
    assert spiffy_of(config) is None
    assert config.additional_config.keys() == {"dllm"}


@pytest.mark.parametrize(("has_drafts", "mode"), [(False, "FULL_DECODE_ONLY"), (True, "FULL")])
def test_graphs_are_captured_by_number_of_blocks(has_drafts: bool, mode: str) -> None:
    from vllm.config.compilation import CUDAGraphMode

    from vllm_dllm.engine.step_sizes import _set_cuda_graphs

    compilation = SimpleNamespace(mode=None, cudagraph_mode=None, cudagraph_capture_sizes=None)
    config: Any = SimpleNamespace(
        compilation_config=compilation,
        model_config=SimpleNamespace(enforce_eager=False),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=2048),
    )
    _set_cuda_graphs(config, 32, 50 * 32, is_uniform=not has_drafts)
    assert compilation.cudagraph_mode == CUDAGraphMode[mode]
    num_blocks = [*range(1, 17), 18, 20, 22, 24, 26, 28, 30, 32, 36, 40, 44, 48, 50]
    assert compilation.cudagraph_capture_sizes == [32 * n for n in num_blocks]
    assert compilation.max_cudagraph_capture_size == 1600
    compilation.cudagraph_capture_sizes = [32, 40]
    with pytest.raises(ConfigError, match=r"cudagraph_capture_sizes are \[32, 40\]"):
        _set_cuda_graphs(config, 32, 50 * 32, is_uniform=not has_drafts)
    compilation.cudagraph_capture_sizes = [32, 2048]
    with pytest.raises(ConfigError, match="but max_num_batched_tokens is 2048; give sizes below it"):
        _set_cuda_graphs(config, 32, 50 * 32, is_uniform=not has_drafts)


def test_few_rows_are_padding_and_few_graphs_are_captured() -> None:
    for most in (*range(1, 40), 64, 65, 512, 1000):
        sizes = captured_blocks(most)
        assert sizes == sorted(set(sizes))
        assert sizes[0] == 1
        assert sizes[-1] == most
        assert len(sizes) <= 16 + 8 * max(0, (most - 1).bit_length() - 4)
        for num_blocks in range(1, most + 1):
            padding = min(n for n in sizes if n >= num_blocks) - num_blocks
            assert padding == 0 if num_blocks <= 16 else 9 * padding <= num_blocks + padding


@pytest.mark.parametrize("value", [{}, 8, {"method": "spiffy"}])
def test_our_own_field_is_not_for_users(value: object) -> None:
    with pytest.raises(ValueError, match=r"additional_config\.spiffy is .*, but it is made of speculative_config"):
        engine_config(additional_config={"spiffy": value})


@pytest.mark.parametrize("changes", [{}, {"speculative_config": {"method": "spiffy"}}])
def test_counting_nans_is_refused(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "VLLM_RAISE_ON_LOGIT_NANS", "1")
    with pytest.raises(ValueError, match=r"VLLM_RAISE_ON_LOGIT_NANS is set, .* unset it"):
        engine_config(**changes)


def test_arguments_may_be_used_again_without_it() -> None:
    from vllm_dllm.engine.spiffy_arguments import take_spiffy

    args = arguments(speculative_config={"method": "spiffy"})
    assert take_spiffy(args, OURS)
    assert take_spiffy(args, OURS)
    args.speculative_config = None
    assert not take_spiffy(args, OURS)
    assert "spiffy" not in args.additional_config


def test_what_it_is_made_of_is_no_setting() -> None:
    from vllm_dllm.engine.spiffy_arguments import take_spiffy

    args = arguments(additional_config={"spiffy": {"config": {"method": "spiffy"}, "source": "default"}})
    with pytest.raises(ConfigError, match=r"additional_config\.spiffy is .* give speculative_config"):
        take_spiffy(args, OURS)


def test_vllms_own_numbers_per_request_are_refused() -> None:
    from vllm_dllm.engine.spiffy_arguments import take_spiffy

    args = arguments(speculative_config={"method": "spiffy"}, per_request_spec_decode_metrics="summary")
    with pytest.raises(ConfigError, match=r"per_request_spec_decode_metrics is 'summary'"):
        take_spiffy(args, OURS)
