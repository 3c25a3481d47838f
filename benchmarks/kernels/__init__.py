"""The native ops against what else does their work, and against what the machine can do."""
