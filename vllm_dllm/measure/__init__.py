"""Engines measured end to end, side by side: `vllm-dllm bench decode`. engine/measuring.py has the vLLM side of it."""
