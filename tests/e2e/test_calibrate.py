"""Calibration through the engine: the traces are the decoder's, and the graph is one that a server takes."""

import itertools
import json

import pytest
import torch

from tests.e2e.rig import CHECKPOINT
from vllm_dllm.calibrate.prompts import read_prompts
from vllm_dllm.config import DllmConfig
from vllm_dllm.draft.graph_file import check_fit, load_graph
from vllm_dllm.reference.decode import KvPolicy, generate
from vllm_dllm.reference.model import LLaDA
from vllm_dllm.reference.policy import UnmaskPolicy
from vllm_dllm.reference.sampling import Sampling

pytestmark = [pytest.mark.engine, pytest.mark.slow("calibrate")]

NUM_PROMPTS, GEN_LENGTH = 6, 32


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    """The graph and the traces of a small calibration."""
    import typer
    from typer.testing import CliRunner

    from vllm_dllm.cli.calibrate import calibrate

    folder = tmp_path_factory.mktemp("calibration")
    questions = (CHECKPOINT.parent / "questions.jsonl").read_text().splitlines()[:NUM_PROMPTS]
    (folder / "prompts.jsonl").write_text("\n".join(questions) + "\n")
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(calibrate)
    arguments = [CHECKPOINT, "--prompts", folder / "prompts.jsonl", "-o", folder / "graph.json", "--keep-traces"]
    options = ["--gen-length", GEN_LENGTH, "--block-length", 16, "--dtype", "float32", "--concurrency", 3]
    options += ["--kv-cache-memory-bytes", 64 << 20, "--picture", folder / "graph.svg"]
    result = CliRunner().invoke(app, [str(word) for word in [*arguments, *options]], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return folder


def test_graph_fits_the_server_it_was_made_for(calibration):
    file = load_graph(calibration / "graph.json")
    settings = DllmConfig(block_length=16)
    assert check_fit(file, settings, where="graph", model=str(CHECKPOINT), family="llada") == []
    assert file.provenance is not None
    assert file.provenance.predicted_nfe[3] < file.provenance.predicted_nfe[0] == GEN_LENGTH
    assert (calibration / "graph.svg").stat().st_size > 0


def test_traces_are_what_the_reference_decodes(calibration):
    from transformers import AutoTokenizer

    from vllm_dllm.calibrate.record import TraceFile

    prompts = read_prompts(calibration / "prompts.jsonl", NUM_PROMPTS)
    path = calibration / "graph.json.traces"
    settings = json.loads(path.read_text().split("\n")[0])["settings"]
    with TraceFile(path, settings) as file:
        traces = file.traces
    assert sorted(traces) == list(range(NUM_PROMPTS))
    tokenizer, model = AutoTokenizer.from_pretrained(CHECKPOINT), LLaDA.from_pretrained(CHECKPOINT, torch.float32)
    for i, conversation in enumerate(prompts.conversations):
        text = tokenizer.apply_chat_template(list(conversation), tokenize=False, add_generation_prompt=True)
        ids = tokenizer.encode(text, add_special_tokens=False)
        expected = generate(
            model,
            torch.tensor(ids),
            gen_length=GEN_LENGTH,
            block_length=16,
            kv=KvPolicy("dual"),
            policy=UnmaskPolicy(confidence_dtype=torch.float64),
            sampling=Sampling(forbidden_ids=(model.config.mask_token_id,)),
        )
        blocks = traces[i].blocks
        assert [block.start for block in blocks] == [len(ids), len(ids) + 16]
        canvases = list(itertools.chain.from_iterable(block.canvas[1:].tolist() for block in blocks))
        history = [row[16 * (step // 16) :][:16] for step, row in enumerate(expected.history.tolist())]
        assert canvases == history
