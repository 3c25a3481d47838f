"""State of the requests, indexed by slot; the only mutable state between steps."""
