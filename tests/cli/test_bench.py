"""`vllm-dllm bench decode`: its options, its files and its exit status, with engines that decode nothing."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.e2e.wedlm import make_wild
from tests.measure.fake_engine import install
from vllm_dllm.cli import main
from vllm_dllm.draft.graph import DraftGraph
from vllm_dllm.draft.graph_file import GraphFile, save_graph
from vllm_dllm.errors import ConfigError

TINY = Path(__file__).parents[2] / "examples/tiny_llada"
GIVEN = {
    "--model": TINY / "checkpoint",
    "--prompts": TINY / "questions.jsonl",
    "--num-prompts": 2,
    "--concurrency": "1,2",
    "--budgets": "1,3",
}


def run(out: Path, **changes: object) -> tuple[int, str, str]:
    """Run `bench decode`: exit status, stdout, stderr. A change to None leaves the option out."""
    options = GIVEN | {"--out": out} | {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
    words = [str(word) for name, value in options.items() if value is not None for word in (name, value)]
    result = CliRunner().invoke(main.app, ["bench", "decode", *words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_decode_prints_and_writes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch)
    graphs = [str(tmp_path / name) for name in ("a.json", "b.json")]
    for path in graphs:
        save_graph(GraphFile(DraftGraph.chain(2)), path)
    status, out, _ = run(tmp_path / "deep/out", policy="static,threshold", threshold=0.8, graph=",".join(graphs))
    assert status == 0
    assert out.count("2.00 (2.00 to 2.00)") == 2 * 2 * 4
    assert {path.name for path in (tmp_path / "deep/out").iterdir()} == {"decode.md", "decode.json", "decode.svg"}
    content = json.loads((tmp_path / "deep/out/decode.json").read_text())
    assert content["comparison"]["policies"] == [
        {"settings": {"policy": "static"}, "draft_graph": graphs[0], "ranker": None},
        {"settings": {"policy": "threshold", "threshold": 0.8}, "draft_graph": graphs[1], "ranker": None},
    ]
    assert len(content["runs"]) == 2 * 2 * 5 * 3
    assert content["runs"][0]["variant"] == "off"
    assert content["runs"][0]["num_tokens"] == 8
    assert content["tables"][0]["rows"][1]["ratio"] == {"median": 2.0, "least": 2.0, "most": 2.0}
    assert "| static | 1 | budget 1 |" in (tmp_path / "deep/out/decode.md").read_text()


def test_prompts_are_put_into_the_chat_template(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch)
    run(tmp_path, skip_prompts=1)
    prompts = json.loads((tmp_path / "decode.json").read_text())["comparison"]["workload"]["prompts"]
    assert len(prompts) == 2
    assert {prompt[0] for prompt in prompts} == {2}, "BOS"
    run(tmp_path, skip_prompts=2)
    assert json.loads((tmp_path / "decode.json").read_text())["comparison"]["workload"]["prompts"][0] == prompts[1]


def test_unequal_tokens_are_exit_status_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, wrong_budget=3)
    status, out, error = run(tmp_path)
    assert status == 1
    assert "budget 3, 1 at once: the tokens of prompt 1" in error
    assert "ratio" not in out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"concurrency": "1,x"}, r"--concurrency is '1,x', allowed are lists of whole numbers 1\.\.1024"),
        ({"concurrency": ""}, "give at least one number"),
        ({"budgets": "65"}, r"--budgets is '65', allowed are lists of whole numbers 1\.\.64"),
        ({"chain": "0"}, "--chain is '0'"),
        ({"policy": "best"}, "--policy is 'best'"),
        ({"policy": "threshold", "threshold": 2.0}, "--threshold is 2.0"),
        ({"policy": "static,threshold,random", "graph": "a,b"}, "--graph has 2 graphs and --policy 3 policies"),
        ({"graph": "no-such.json"}, "no-such.json is not a file"),
        ({"skip_prompts": 100_000}, "skip fewer prompts"),
    ],
)
def test_wrong_options_are_refused(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, **changes)


@pytest.fixture(scope="module")
def wedlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wedlm") / "checkpoint"
    make_wild(path, has_biases=False)
    return path


def test_windows_are_measured_without_a_policy_and_a_chain_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wedlm: Path
) -> None:
    install(monkeypatch)
    assert run(tmp_path, model=wedlm, entropy_bound=0.3, block_length=8)[0] == 0
    content = json.loads((tmp_path / "decode.json").read_text())
    comparison = content["comparison"]
    assert comparison["policies"] == [
        {"settings": {"entropy_bound": 0.3, "position_penalty": 0.02}, "draft_graph": "default", "ranker": None}
    ]
    assert (comparison["budgets"], comparison["chain"], comparison["workload"]["block_length"]) == ([1, 3], [], 8)
    assert {taken["variant"] for taken in content["runs"]} == {"off", "budget 1", "budget 3", "auto"}
    assert "| entropy_bound 0.3 position_penalty 0.02 | 1 | budget 1 |" in (tmp_path / "decode.md").read_text()
    assert run(tmp_path, model=wedlm, chain="", graph="default", budgets="")[0] == 0, "which is what there is anyway"


@pytest.mark.parametrize(
    ("window", "budgets"), [(16, [1, 3, 5]), (6, [1, 3, 5]), (5, [1, 3]), (4, [1, 3]), (3, [1]), (2, [1]), (1, [])]
)
def test_budgets_that_are_not_given_fit_the_window(
    window: int, budgets: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wedlm: Path
) -> None:
    install(monkeypatch)
    assert run(tmp_path, model=wedlm, budgets=None, block_length=window)[0] == 0
    assert json.loads((tmp_path / "decode.json").read_text())["comparison"]["budgets"] == budgets


def test_budgets_that_are_not_given_are_three_of_blocks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch)
    assert run(tmp_path, budgets=None, block_length=2)[0] == 0
    comparison = json.loads((tmp_path / "decode.json").read_text())["comparison"]
    assert (comparison["budgets"], comparison["chain"]) == ([1, 3, 5], [3])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy": "static"}, "--policy is 'static', but windows that slide, as "),
        ({"threshold": 0.9}, "--threshold is '0.9', but windows that slide, as "),
        ({"alg_temp": 0.0}, "--alg-temp is '0.0', but windows"),
        ({"credit": "0.7,0.8,0.2"}, "--credit is '0.7,0.8,0.2', but windows"),
        ({"parameter": "local_leap_radius=4"}, "--parameter local_leap_radius is '4.0', but windows"),
        ({"graph": "graph.json"}, "--graph is 'graph.json', but windows"),
        ({"ranker": "ranker.safetensors"}, "--ranker is 'ranker.safetensors', but windows"),
        ({"chain": "3"}, r"--chain is '3', but .* their drafts are chains \(--budgets\); allowed is none; remove it"),
        (
            {"budgets": "1,16"},
            r"--budgets is '1,16', allowed for windows of 16 are lists of whole numbers 1\.\.15 like 1,4; correct it",
        ),
        (
            {"budgets": "1,3,5", "block_length": 4},
            r"--budgets is '1,3,5', allowed for windows of 4 are lists of whole numbers 1\.\.3 like 1; correct it",
        ),
        (
            {"budgets": "1", "block_length": 1},
            "--budgets is '1', allowed for windows of 1 is '' alone, which is none; correct it",
        ),
        ({"entropy_bound": 0.0}, "--entropy-bound is 0.0, allowed are finite numbers above 0"),
    ],
)
def test_what_windows_do_not_have_is_refused(
    changes: dict[str, object], message: str, tmp_path: Path, wedlm: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, model=wedlm, **changes)
