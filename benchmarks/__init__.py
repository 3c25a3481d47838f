"""Measurements behind docs/benchmarks.md that need the repository: README.md lists them."""
