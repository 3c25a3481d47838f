"""Ask a model questions without a server, and print how many forwards and drafts each answer took.

python examples/offline.py examples/tiny_llada/checkpoint "46 + 27 = ?" "Sort 4 1 5 7 6"
"""

import argparse

from vllm import LLM, SamplingParams


def main() -> None:
    """Print the answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="name or path")
    parser.add_argument("questions", nargs="+", metavar="question")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument(
        "--kv-cache-gib", type=float, default=1, help="on a CPU, for K/V beside the weights: %(default)s"
    )
    options = parser.parse_args()
    llm = LLM(
        options.model,
        speculative_config={"method": "spiffy"},
        kv_cache_memory_bytes=int(options.kv_cache_gib * 2**30),
    )
    params = SamplingParams(temperature=0, max_tokens=options.max_tokens, extra_args={"dllm_policy": "threshold"})
    conversations = [[{"role": "user", "content": question}] for question in options.questions]
    for question, output in zip(options.questions, llm.chat(conversations, params, use_tqdm=False), strict=True):
        took = output.kv_transfer_params["dllm"]
        print(f"{question}\n  {output.outputs[0].text}")
        print(f"  {took['nfe']} forwards, {took['accepted']} of {took['proposed']} drafts accepted")


if __name__ == "__main__":  # vLLM starts processes that import this file
    main()
