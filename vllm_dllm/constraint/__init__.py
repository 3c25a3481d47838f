"""Structured output in any order: what each masked position may become, so that the whole can still be completed."""
