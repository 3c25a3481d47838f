"""Measurements, each a ratio within one run: `python -m vllm_dllm.bench --model PATH --prompts FILE.jsonl`."""
