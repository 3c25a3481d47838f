"""Answer a file of questions with `vllm run-batch`: one engine, all of them at once, no server.

    python examples/batch.py examples/tiny_llada/checkpoint examples/tiny_llada/questions.jsonl answers.jsonl \\
      --kv-cache-memory-bytes 1G

What stands behind the three arguments goes to vLLM.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path


def request(number: int, question: str, model: str) -> str:
    """Return a line of a batch file."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 64,
        "temperature": 0,
        "vllm_xargs": {"dllm_policy": "threshold"},
    }
    line = {"custom_id": str(number), "method": "POST", "url": "/v1/chat/completions", "body": body}
    return json.dumps(line) + "\n"


def main() -> None:
    """Write the answers, a JSON object per line, in the order of the questions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="name or path")
    parser.add_argument("questions", type=Path, help="JSON lines with `question`")
    parser.add_argument("answers", type=Path, help="file to write")
    options, more = parser.parse_known_args()
    questions = [json.loads(line)["question"] for line in options.questions.read_text().splitlines()]
    with tempfile.TemporaryDirectory() as folder:
        given, replies = Path(folder, "in.jsonl"), Path(folder, "out.jsonl")
        given.write_text("".join(request(i, question, options.model) for i, question in enumerate(questions)))
        command = ["vllm", "run-batch", "-i", str(given), "-o", str(replies), "--model", options.model, *more]
        subprocess.run(command, check=True)
        lines = sorted(map(json.loads, replies.read_text().splitlines()), key=lambda line: int(line["custom_id"]))
    with options.answers.open("w") as file:
        for question, line in zip(questions, lines, strict=True):
            answer = line["response"]["body"]["choices"][0]["message"]["content"]
            file.write(json.dumps({"question": question, "answer": answer}) + "\n")


if __name__ == "__main__":
    main()
