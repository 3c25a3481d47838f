"""Quantised copies of the trained model keep most answers right."""

import json
import runpy
from pathlib import Path

import pytest

from tests.e2e.rig import CHECKPOINT, EXAMPLES, engine

pytestmark = pytest.mark.engine

MOST_WRONG = 0.1


@pytest.mark.slow("answers")
@pytest.mark.parametrize("name", ["gptq-int4", "int8", "fp8"])
def test_answers_stay_right(name: str, tmp_path: Path) -> None:
    from vllm import SamplingParams

    runpy.run_path(str(EXAMPLES / "quantise.py"))["write"](CHECKPOINT, tmp_path / name, name)
    lines = (EXAMPLES / "tiny_llada/questions.jsonl").read_text().splitlines()
    asked = [json.loads(line) for line in lines]
    chats = [[{"role": "user", "content": each["question"]}] for each in asked]
    with engine(tmp_path / name, {}, dtype="bfloat16", max_model_len=256) as llm:
        outputs = llm.chat(chats, SamplingParams(temperature=0, max_tokens=64), use_tqdm=False)
        method = type(llm.llm_engine.vllm_config.quant_config).__name__
    assert method == ("AutoGPTQConfig" if name == "gptq-int4" else "CompressedTensorsConfig")
    wrong = [each for each, output in zip(asked, outputs, strict=True) if output.outputs[0].text != each["answer"]]
    assert len(wrong) <= MOST_WRONG * len(asked), wrong
