"""Measurements behind docs/benchmarks.md, as `vllm-dllm bench`: each figure is a ratio within one run."""
