"""Have a server answer in JSON of a schema: the reply can be nothing else, whatever the model would rather say.

vllm serve examples/tiny_llada/checkpoint --kv-cache-memory-bytes 1G &
python examples/structured.py http://localhost:8000/v1 "JSON name ida, size 60"
"""

import argparse
import json

import openai

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "size": {"type": "integer", "minimum": 0, "maximum": 999},
    },
    "required": ["name", "size"],
    "additionalProperties": False,
}


def main() -> None:
    """Print the object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base_url", help="for example http://localhost:8000/v1")
    parser.add_argument("question")
    options = parser.parse_args()
    client = openai.OpenAI(base_url=options.base_url, api_key="none")
    reply = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": options.question}],
        max_tokens=64,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA}},
    )
    thing = json.loads(reply.choices[0].message.content or "")
    print(f"{thing['name']} has size {thing['size']}")


if __name__ == "__main__":
    main()
