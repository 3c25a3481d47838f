"""Policies in torch code, one kind a file; `unmask.registry` lists them, docs/policies.md says what each does."""
