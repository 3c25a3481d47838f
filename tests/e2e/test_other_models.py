"""A stock model does not notice that the plugin is installed: same tokens, same runner, same attention backend."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.rig import CHECKPOINT

pytestmark = pytest.mark.engine

PROGRAM = """
import json, sys
from vllm import LLM, SamplingParams
llm = LLM(sys.argv[1], dtype="float32", max_model_len=64, max_num_seqs=4, kv_cache_memory_bytes=32 << 20,
          distributed_executor_backend="uni", enforce_eager=True)
params = [SamplingParams(temperature=t, seed=7, max_tokens=12, ignore_eos=True) for t in (0.0, 0.8)]
outputs = llm.generate([{"prompt_token_ids": [5, 6, 7]}] * 2, params, use_tqdm=False)
config = llm.llm_engine.vllm_config
runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
layers = config.compilation_config.static_forward_context.values()
print("RESULT " + json.dumps({
    "tokens": [list(output.outputs[0].token_ids) for output in outputs],
    "runner": type(runner).__module__ + "." + type(runner).__name__,
    "backends": sorted({layer.attn_backend.get_name() for layer in layers}),
    "scheduler": str(config.scheduler_config.scheduler_cls),
    "prefix_caching": config.cache_config.enable_prefix_caching,
    "chunked_prefill": config.scheduler_config.enable_chunked_prefill,
    "loaded": "vllm_dllm" in sys.modules,
}))
"""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        vocab_size=len(tokenizer),
        max_position_embeddings=128,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def serve(model: Path, plugins: str | None) -> "subprocess.Popen[str]":
    environment = {key: value for key, value in os.environ.items() if not key.startswith("VLLM_")}
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if plugins is not None:
        environment["VLLM_PLUGINS"] = plugins
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(model)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def result(process: "subprocess.Popen[str]") -> dict[str, Any]:
    output, _ = process.communicate(timeout=300)
    lines = [line for line in output.splitlines() if line.startswith("RESULT ")]
    assert lines, output[-3000:]
    found: dict[str, Any] = json.loads(lines[0].removeprefix("RESULT "))
    return found


def test_a_stock_llama_is_untouched(llama: Path) -> None:
    with_plugin, without = (result(process) for process in [serve(llama, None), serve(llama, "")])
    assert with_plugin.pop("loaded")
    assert not without.pop("loaded")
    assert with_plugin == without
