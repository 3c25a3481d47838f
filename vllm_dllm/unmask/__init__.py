"""Which masked positions get their token in a step, and what the model says about each position."""
