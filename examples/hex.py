"""HEX (arXiv:2510.05040): answer a question in blocks of several lengths, and take the most frequent answer.

    vllm serve GSAI-ML/LLaDA-8B-Instruct --additional-config '{"dllm": {"block_length": 128}}' &
    python examples/hex.py http://localhost:8000/v1 "61 + 27 = ?"

A server has one `block_length`; a request chooses shorter blocks within it by the policy `adablock`, which without
delimiters decodes `adablock_length` positions after another. As published: five seeds, temperature 0.9, and of answers
with equal votes that of the shortest blocks. Ours: a step writes one token, where the published runs write two.
"""

import argparse
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import openai


def most_frequent(texts: Iterable[str], pattern: str) -> tuple[str, int]:
    """Return the answer that most texts have, and how many do; of equally many the first one's.

    Args:
        texts: replies, those of the shortest blocks first.
        pattern: finds a text's answer; other texts have none.
    """
    votes = Counter(match[0].strip() for text in texts if (match := re.search(pattern, text)))
    return votes.most_common(1)[0] if votes else ("", 0)


def replies(client: openai.OpenAI, question: str, lengths: Sequence[int], num_seeds: int, max_tokens: int) -> list[str]:
    """Return a server's replies, all asked at once, in the order of lengths and seeds."""
    model = client.models.list().data[0].id

    def reply(run: tuple[int, int]) -> str:
        options = {"dllm_policy": "adablock", "dllm_adablock_ahead": 0, "dllm_threshold": 1}
        done = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": question}],
            temperature=0.9,
            seed=run[1],
            max_tokens=max_tokens,
            extra_body={"vllm_xargs": {**options, "dllm_adablock_length": run[0]}},
        )
        return done.choices[0].message.content or ""

    runs = [(length, seed) for length in sorted(lengths) for seed in range(num_seeds)]
    with ThreadPoolExecutor(len(runs)) as pool:
        return list(pool.map(reply, runs))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="of the server's API")
    parser.add_argument("question")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8, 16, 32, 64, 128])
    parser.add_argument("--pattern", default=r"-?[\d.]*\d(?=\D*$)", help="finds the answer in a reply")
    given = parser.parse_args()
    server = openai.OpenAI(base_url=given.url, api_key="none")
    print(*most_frequent(replies(server, given.question, given.lengths, 5, 128), given.pattern))
