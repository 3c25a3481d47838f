"""Calibration of a block-causal model: settings and memory are its own, blocks begin with the prompt's end."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.rig import CHECKPOINT
from tests.e2e.sdar import make_wild_sdar
from vllm_dllm.calibrate.record import TraceFile
from vllm_dllm.draft.graph_file import load_graph
from vllm_dllm.reference.block_causal import generate
from vllm_dllm.reference.policy import UnmaskPolicy
from vllm_dllm.reference.qwen import Qwen
from vllm_dllm.reference.sampling import Sampling

pytestmark = [pytest.mark.engine, pytest.mark.slow("calibrate")]

NUM_PROMPTS, GEN_LENGTH, BLOCK_LENGTH = 4, 20, 8


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of a small calibration, and what its engine was started with."""
    import typer
    from typer.testing import CliRunner

    from vllm_dllm.cli.calibrate import calibrate
    from vllm_dllm.engine import recording

    folder, started = tmp_path_factory.mktemp("calibration"), {}
    make_wild_sdar(folder / "model")
    questions = (CHECKPOINT.parent / "questions.jsonl").read_text().splitlines()[:NUM_PROMPTS]
    (folder / "prompts.jsonl").write_text("\n".join(questions) + "\n")
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(calibrate)
    words = [folder / "model", "--prompts", folder / "prompts.jsonl", "-o", folder / "graph.json", "--keep-traces"]
    words += [
        "--dtype",
        "float32",
        "--gen-length",
        GEN_LENGTH,
        "--block-length",
        BLOCK_LENGTH,
        "--threshold",
        0.3,
        "--concurrency",
        3,
    ]
    with pytest.MonkeyPatch.context() as patch:
        start = recording.LLM
        patch.setattr(recording, "LLM", lambda *args, **kwargs: started.update(kwargs) or start(*args, **kwargs))
        result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return folder, started


def test_the_engine_has_memory_for_the_requests_at_a_time(calibration: tuple[Path, dict[str, Any]]) -> None:
    _, started = calibration
    assert started["max_model_len"] < 128
    per_token = 2 * 3 * 2 * 32 * 4  # K and V, layers, heads, head size, bytes
    assert started["kv_cache_memory_bytes"] == per_token * 128 * (3 + 1)


def test_settings_are_the_models_where_none_are_given(calibration: tuple[Path, dict[str, Any]]) -> None:
    made = load_graph(calibration[0] / "graph.json").provenance
    assert made is not None
    assert made.family == "sdar"
    assert (made.settings.policy, made.settings.threshold) == ("dynamic", 0.3)
    assert (made.settings.kv_policy, made.settings.block_length) == ("block_causal", BLOCK_LENGTH)


def test_traces_are_what_the_reference_decodes(calibration: tuple[Path, dict[str, Any]]) -> None:
    from transformers import AutoTokenizer

    from vllm_dllm.calibrate.prompts import encode, read_prompts

    folder, _ = calibration
    path = folder / "graph.json.traces"
    with TraceFile(path, json.loads(path.read_text().split("\n")[0])["settings"]) as file:
        traces = file.traces
    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder / "model"),
        Qwen.from_pretrained(folder / "model", torch.float32),
    )
    partial_lens = set()
    for i, conversation in enumerate(read_prompts(folder / "prompts.jsonl", NUM_PROMPTS).conversations):
        prompt = encode(tokenizer, conversation)
        history = generate(
            model,
            torch.tensor(prompt),
            gen_length=GEN_LENGTH,
            block_length=BLOCK_LENGTH,
            policy=UnmaskPolicy("dynamic", threshold=0.3, confidence_dtype=torch.float64),
            sampling=Sampling(forbidden_ids=(model.config.mask_token_id,)),
        ).history.tolist()
        found = [(block.start, canvas) for block in traces[i].blocks for canvas in block.canvas[1:].tolist()]
        expected = [
            (prompt + row)[start : start + BLOCK_LENGTH] for (start, _), row in zip(found, history, strict=True)
        ]
        assert [canvas for _, canvas in found] == expected
        assert {start % BLOCK_LENGTH for start, _ in found} == {0}
        partial_lens.add(len(prompt) % BLOCK_LENGTH)
    assert partial_lens - {0}
