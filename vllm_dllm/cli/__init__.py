"""The command line `vllm-dllm`: a file per command, registered in `main`.

Whatever imports torch or vLLM, a command imports within its function, so that the others start at once.
"""
