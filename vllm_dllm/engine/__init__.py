"""The vLLM surface: what the scheduler, the runner and the model call."""
