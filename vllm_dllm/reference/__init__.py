"""The specification in plain torch: what every engine path is compared with. Imports no vLLM."""
