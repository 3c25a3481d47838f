"""Make a draft graph: decode prompts, see which guesses would have come true, choose the best ones."""
