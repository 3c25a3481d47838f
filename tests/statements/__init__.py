"""Plain statements of the policies: scalar Python, written from their descriptions and from the published code.

They share nothing with `vllm_dllm/unmask/` and `vllm_dllm/reference/`, so that a mistake of one is hardly a mistake of
both. One file per kind of rule; `step.py` has what all of them see, `decode.py` the loop over a block.
"""
