"""vLLM model classes of the families: layers and weight names, no decoding."""
