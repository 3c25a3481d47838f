"""`vllm-dllm bench decode`: its options, its files and its exit status, with engines that decode nothing."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

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
    """Run `bench decode`: exit status, stdout, stderr."""
    options = GIVEN | {"--out": out} | {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
    words = [str(word) for option in options.items() for word in option]
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
