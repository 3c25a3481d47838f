"""What the parts of drafting are worth, on recorded decoding."""
