"""Draft graphs: what Spiffy guesses of a block's next states, and which guesses came true."""
