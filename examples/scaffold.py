"""Schema scaffolding (S3): give the keys and signs of a JSON object, and have a model fill in the values.

    vllm serve examples/tiny_llada/checkpoint &
    python examples/scaffold.py http://localhost:8000/v1 "JSON name bob, age 42" name:text:3 age:number:2

A hole has as many tokens as its field says. Where a value needs fewer, end tokens fill it, which have no text.
"""

import argparse
import sys
from collections.abc import Sequence

import openai


def scaffold(fields: Sequence[str], mask: str) -> str:
    """Return a JSON object with holes.

    Args:
        fields: each a name, `text` or `number`, and how many tokens its value may have, like "age:number:2".
        mask: the text of the tokenizer's mask token.
    """
    members = []
    for field in fields:
        name, kind, count = field.rsplit(":", 2)
        quote = {"text": '"', "number": ""}[kind]
        members.append(f'"{name}": {quote}{mask * int(count)}{quote}')
    return "{" + ", ".join(members) + "}"


def fill(client: openai.OpenAI, question: str, canvas: str) -> str:
    """Return a canvas with its holes filled by the server's model."""
    reply = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        extra_body={"ignore_eos": True, "vllm_xargs": {"dllm_canvas": canvas}},
    )
    return str(reply.choices[0].message.content)


def main() -> None:
    """Print what a server makes of a scaffold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base_url", help="for example http://localhost:8000/v1")
    parser.add_argument("question")
    parser.add_argument("fields", nargs="+", metavar="NAME:text|number:TOKENS")
    parser.add_argument("--mask", default="<|mdm_mask|>", help="text of the tokenizer's mask token, by default LLaDA's")
    options = parser.parse_args()
    client = openai.OpenAI(base_url=options.base_url, api_key="none")
    sys.stdout.write(fill(client, options.question, scaffold(options.fields, options.mask)) + "\n")


if __name__ == "__main__":
    main()
