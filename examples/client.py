"""Ask a server a question with the OpenAI client, and print the answer as its blocks come.

vllm serve examples/tiny_llada/checkpoint --kv-cache-memory-bytes 1G --spec-method spiffy &
python examples/client.py http://localhost:8000/v1 "46 + 27 = ?"
"""

import argparse

import openai


def main() -> None:
    """Print the answer, and what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base_url", help="for example http://localhost:8000/v1")
    parser.add_argument("question")
    parser.add_argument("--policy", default="threshold", help="unmasking policy, by default %(default)s")
    options = parser.parse_args()
    client = openai.OpenAI(base_url=options.base_url, api_key="none")
    stream = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": options.question}],
        max_tokens=64,
        temperature=0,
        stream=True,
        extra_body={"vllm_xargs": {"dllm_policy": options.policy}},
    )
    for chunk in stream:
        (choice,) = chunk.choices
        print(choice.delta.content or "", end="", flush=True)
        if choice.finish_reason:
            took = chunk.model_extra["kv_transfer_params"]["dllm"]
            print(f"\n{took['nfe']} forwards, {took['accepted']} of {took['proposed']} drafts accepted")


if __name__ == "__main__":
    main()
