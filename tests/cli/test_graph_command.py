"""`vllm-dllm graph`: what it prints, writes and returns, and that it loads nothing heavy."""

import importlib
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.draft.example_graph import FILE, GRAPH
from tests.models.in_process import LLADA22
from vllm_dllm.cli import main
from vllm_dllm.config import DllmConfig
from vllm_dllm.draft.graph import DraftGraph
from vllm_dllm.draft.graph_file import GraphFile, load_graph, save_graph
from vllm_dllm.draft.graph_schema import ModelShape
from vllm_dllm.draft.merge import merge_graphs
from vllm_dllm.draft.picture import draw_graph, title_of
from vllm_dllm.errors import ConfigError

EXAMPLES = Path(__file__).parents[2] / "examples"
WIDE = {"COLUMNS": "200"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_graph(FILE, tmp_path / "graph.json")
    return tmp_path / "graph.json"


def run(*words: object) -> tuple[int, str, str]:
    """Run a command in this process: exit status, stdout, stderr."""
    result = CliRunner(env=WIDE).invoke(main.app, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_show_has_a_row_per_node_and_the_provenance(path: Path) -> None:
    status, out, _ = run("graph", "show", path)
    assert status == 0
    rows = [line.split("│")[1:-1] for line in out.splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in row] for row in rows]
    assert ["1", "{0}", "1", "root", "80", "80.0%"] in cells
    assert ["3", "{0-1}", "2", "1 2", "30", "30.0%"] in cells
    assert ["4", "{0:1}", "1", "root", "5", "5.0%"] in cells
    assert ["model", "models/llada-tiny"] in cells
    assert ["predicted_nfe", "0: 32, 3: 14.5, 10: 9.25"] in cells
    assert ["prompts", f"50 of train.jsonl, SHA-256 {'0' * 64}"] in cells
    assert ["threshold", "0.8"] in cells


def test_show_leaves_out_what_nobody_counted(tmp_path: Path) -> None:
    save_graph(GraphFile(DraftGraph((((0, 0),),))), tmp_path / "graph.json")
    status, out, _ = run("graph", "show", tmp_path / "graph.json")
    assert (status, "calibration" in out, "%" in out) == (0, False, False)


@pytest.mark.parametrize(("name", "begin"), [("out.svg", b"<?xml"), ("out.png", b"\x89PNG")])
def test_show_draws_the_same_picture_every_time(name: str, begin: bytes, path: Path, tmp_path: Path) -> None:
    pictures = []
    for _ in range(2):
        assert run("graph", "show", path, "--picture", tmp_path / name)[0] == 0
        pictures.append((tmp_path / name).read_bytes())
    assert pictures[0] == pictures[1]
    assert pictures[0].startswith(begin)


def test_a_picture_names_every_node(tmp_path: Path) -> None:
    draw_graph(GRAPH, tmp_path / "out.svg", "a $title$ & more")
    text = (tmp_path / "out.svg").read_text()
    assert all(label in text for label in ("root", "{0}", "{1}", "{0-1}", "{0:1}", "3:  30.0%", "a $title$ &amp; more"))
    draw_graph(DraftGraph(GRAPH.formulas), tmp_path / "uncounted.svg", "")
    assert "Percent" not in (tmp_path / "uncounted.svg").read_text()


def test_a_picture_says_what_the_graph_is_for(path: Path, tmp_path: Path) -> None:
    assert run("graph", "show", path, "--picture", tmp_path / "out.svg")[0] == 0
    assert "Draft graph with 4 nodes for models/llada-tiny, policy" in (tmp_path / "out.svg").read_text()
    assert title_of(GraphFile(GRAPH)) == "Draft graph with 4 nodes"


def test_pictures_that_cannot_be_drawn(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(ConfigError, match=r"allowed are paths that end in \.svg or \.png"):
        draw_graph(GRAPH, tmp_path / "out.pdf", "")
    with pytest.raises(ConfigError, match="cannot be written"):
        draw_graph(GRAPH, tmp_path / "missing/out.svg", "")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install 'vllm-dllm\[tools\]'"):
        draw_graph(GRAPH, tmp_path / "out.svg", "")


def test_check_takes_what_is_not_given_from_the_calibration(path: Path) -> None:
    assert run("graph", "check", path) == (0, f"{path}: 4 nodes, 0 warnings\n", "")
    assert run("graph", "check", path, "--block-length", 16)[1].endswith("0 warnings\n")


def test_check_with_a_model_warns_as_its_server_does(tmp_path: Path) -> None:
    """L's graph on S: both are in a folder called `checkpoint`, and of one shape."""
    from vllm.engine.arg_utils import EngineArgs

    from vllm_dllm import plugin
    from vllm_dllm.engine.configs import spiffy_of

    plugin.register()
    graph, small = EXAMPLES / "tiny_llada/graph.json", tmp_path / "small.json"
    file = load_graph(graph)
    fitting = [node for node, formula in enumerate(file.graph.formulas, start=1) if formula[-1][0] < 4]
    save_graph(GraphFile(file.graph.only(fitting), None), small)
    assert file.provenance is not None
    settings = file.provenance.settings.model_copy(update={"block_length": 4})
    save_graph(GraphFile(load_graph(small).graph, file.provenance.model_copy(update={"settings": settings})), small)
    for model, path in [(EXAMPLES / "tiny_sdar/checkpoint", small), (EXAMPLES / "tiny_llada/checkpoint", graph)]:
        args = EngineArgs(str(model), speculative_config={"method": "spiffy", "draft_graph": str(path)})
        found = spiffy_of(args.create_engine_config())
        assert found is not None
        status, out, _ = run("graph", "check", path, "--model", model)
        assert (status, out.splitlines()[:-1]) == (0, list(found.warnings))
        assert bool(found.warnings) == (path is small)
    assert run("graph", "check", graph, "--model", EXAMPLES / "tiny_sdar/checkpoint")[0] == 1  # longer than its blocks


def test_check_takes_a_models_editing_policy_and_its_tokens(tmp_path: Path) -> None:
    """Of LLaDA2.2, which config.json says by fields that are no settings."""
    (tmp_path / "config.json").write_text(json.dumps(LLADA22))
    save_graph(GraphFile(GRAPH), tmp_path / "graph.json")
    given = ("graph", "check", tmp_path / "graph.json", "--model", tmp_path, "--block-length", 8)
    assert run(*given)[1].endswith("4 nodes, 0 warnings\n")
    settings = {"policy": "indel", "block_length": 8, "threshold": 0.5, "indel_delete": 6, "indel_split": 7}
    assert FILE.provenance is not None
    shape = ModelShape.of(LLADA22)
    for change, warned in [({}, 0), ({"indel_delete": 5}, 1), ({"policy": "dynamic"}, 1)]:
        its = DllmConfig.model_validate(settings | {"kv_policy": "block_causal"} | change)
        provenance = FILE.provenance.model_copy(update={"family": "llada2_moe", "shape": shape, "settings": its})
        save_graph(GraphFile(GRAPH, provenance), tmp_path / "graph.json")
        status, out, _ = run(*given)
        assert (status, out.count("\n")) == (0, 1 + warned), out


def test_check_warns_of_another_server(path: Path) -> None:
    status, out, err = run("graph", "check", path, "--policy", "static")
    warning, last = out.splitlines()
    assert (status, err, last) == (0, "", f"{path}: 4 nodes, 1 warning")
    assert "calibrated with policy 'threshold' but is used with 'static', so" in warning


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--block-length", 1), "block_length of this server is 1"),
        (("--threshold", 2), "--threshold is 2.0"),
        (("--steps-per-block", 999), "--steps-per-block is 999 but --block-length is 16, and each step"),
    ],
)
def test_check_fails_for_what_cannot_serve(options: tuple, part: str, path: Path) -> None:
    status, out, err = run("graph", "check", path, *options)
    assert (status, out) == (1, "")
    assert part in err


def test_check_fails_for_a_malformed_file(path: Path) -> None:
    path.write_text(path.read_text().replace("[[0, 1]]", "[[0, 9]]"))
    status, _, err = run("graph", "check", path)
    assert status == 1
    assert err.startswith(f"{path}: nodes[3].formula[0][1] is 9")
    assert (err.count("\n"), err.count("\nnext: ")) == (2, 1)


def test_check_of_a_graph_without_provenance(tmp_path: Path) -> None:
    save_graph(GraphFile(GRAPH), tmp_path / "graph.json")
    assert run("graph", "check", tmp_path / "graph.json", "--policy", "factor", "--block-length", 4)[0] == 0
    assert run("graph", "check", tmp_path / "graph.json", "--block-length", 1)[0] == 1


def test_merge_writes_a_file(path: Path, tmp_path: Path) -> None:
    output = tmp_path / "merged.json"
    assert FILE.provenance is not None
    more = (FILE.provenance.prompts[0].model_copy(update={"sha256": "1" * 64}),)
    other = GraphFile(GRAPH, FILE.provenance.model_copy(update={"prompts": more}))
    save_graph(other, tmp_path / "other.json")
    status, out, _ = run("graph", "merge", path, tmp_path / "other.json", "-o", output, "--nodes", 3)
    assert (status, out) == (0, f"{output}: 3 nodes, 200 states\n")
    assert load_graph(output) == merge_graphs([("a", FILE), ("b", other)], 3)
    assert load_graph(output).graph.counts == (160, 80, 60)


def test_errors_end_as_one_line_and_status_2(tmp_path: Path, monkeypatch, capsys) -> None:
    missing = tmp_path / f"{'long-name-' * 20}.json"
    monkeypatch.setattr(sys, "argv", ["vllm-dllm", "graph", "show", str(missing)])
    with pytest.raises(SystemExit) as ended:
        main.main()
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert err.startswith(f"{missing} is not a file")
    assert (err.count("\n"), err.count("\nnext: ")) == (2, 1)


def test_the_program_starts_without_torch_and_vllm() -> None:
    code = "import sys, vllm_dllm.cli.main; print(sorted({'torch', 'vllm', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_package_installs_the_program() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, name = project["scripts"]["vllm-dllm"].split(":")
    assert getattr(importlib.import_module(module), name) is main.main
    assert any(need.startswith("matplotlib") for need in project["optional-dependencies"]["tools"])
