"""The process of `vllm_dllm.self_test.isolated`."""

from vllm_dllm.self_test.isolated import serve

if __name__ == "__main__":
    serve()
