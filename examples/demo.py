"""Serve the small model of this checkout with `vllm serve` and talk to it with the OpenAI client.

Prints each answer, whether it is right, and for three unmasking policies the tokens per second and the forward passes
per token. `make demo` runs it.
"""

import contextlib
import random
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path

from openai import OpenAI
from openai.types.chat import ChatCompletion

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "tiny_llada"))
from tasks import TASKS, Example, draw  # noqa: E402 - an example's module, not a package

CHECKPOINT = HERE / "tiny_llada" / "checkpoint"
MODEL = "tiny-llada"
MAX_TOKENS = 64
BLOCK_LENGTH = 32  # the server's default
LOG = HERE.parent / "build" / "demo-server.log"
START_TIMEOUT_S = 240
POLICIES = {
    "one token per step": {"dllm_policy": "static"},
    "two tokens per step": {"dllm_policy": "static", "dllm_steps": 32},
    "confidence above 0.9": {"dllm_policy": "threshold", "dllm_threshold": 0.9},
}


@contextlib.contextmanager
def server() -> Iterator[str]:
    """Run `vllm serve` until the block ends; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        str(Path(sys.executable).with_name("vllm")),
        *("serve", str(CHECKPOINT), "--served-model-name", MODEL, "--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", "float32", "--max-num-seqs", "16", "--kv-cache-memory-bytes", str(128 << 20)),
    ]
    print("$", " ".join(command), flush=True)
    LOG.parent.mkdir(exist_ok=True)
    with LOG.open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_until_ready(process, f"http://127.0.0.1:{port}")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()


def wait_until_ready(process: "subprocess.Popen[bytes]", address: str) -> None:
    """Return when the server answers; exit with the end of its log when it does not."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{address}/health", timeout=2)
            return
        time.sleep(0.5)
    sys.exit(f"the server did not start; the end of {LOG}:\n" + "\n".join(LOG.read_text().splitlines()[-30:]))


def denoising_steps(address: str) -> int:
    """Read how many denoising forwards requests took part in, from vLLM's metrics."""
    metrics = urllib.request.urlopen(f"{address}/metrics", timeout=10).read().decode()
    found = re.findall(r"^vllm:diffusion_num_denoising_steps_total\{.*\} ([\d.e+]+)$", metrics, re.MULTILINE)
    return int(sum(map(float, found)))


def settled_denoising_steps(address: str) -> int:
    """Read the same once it stands still: the server exports its counters a moment after its replies."""
    before, now = -1, denoising_steps(address)
    while now != before:
        time.sleep(0.5)
        before, now = now, denoising_steps(address)
    return now


def ask(client: OpenAI, example: Example, policy: dict[str, object]) -> ChatCompletion:
    """Ask one question."""
    return client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": example.question}],
        max_tokens=MAX_TOKENS,
        extra_body={"vllm_xargs": policy},
    )


def show_answers(client: OpenAI, examples: list[Example]) -> None:
    """Stream one answer per task."""
    for example in examples:
        stream = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": example.question}],
            max_tokens=MAX_TOKENS,
            stream=True,
        )
        answer = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        print(f"  {example.question:34} -> {answer:40} {'right' if answer == example.answer else 'WRONG'}", flush=True)


def measure(client: OpenAI, address: str, examples: list[Example]) -> None:
    """Ask all questions at once with each policy, and print what that took."""
    print(f"\n{len(examples)} questions at once:")
    print(f"  {'unmasking policy':22} {'right':>6} {'tokens/s':>9} {'forwards/token':>15} {'of them refreshes':>18}")
    for name, policy in POLICIES.items():
        steps = settled_denoising_steps(address)
        begin = time.monotonic()
        with ThreadPoolExecutor(len(examples)) as pool:
            replies = list(pool.map(ask, repeat(client), examples, repeat(policy)))
        seconds = time.monotonic() - begin
        tokens = sum(reply.usage.completion_tokens for reply in replies if reply.usage)
        right = sum(
            reply.choices[0].message.content == example.answer for reply, example in zip(replies, examples, strict=True)
        )
        # One when a block begins; a reply ends in the block that holds its last token.
        refreshes = sum(-(-reply.usage.completion_tokens // BLOCK_LENGTH) for reply in replies if reply.usage)
        forwards = settled_denoising_steps(address) - steps + refreshes
        share = f"{right}/{len(examples)}"
        print(f"  {name:22} {share:>6} {tokens / seconds:9.1f} {forwards / tokens:15.2f} {refreshes / forwards:18.1%}")


def main() -> None:
    """Run the demonstration."""
    rng = random.Random(0)
    examples = [draw(task, rng, held_out=True) for task in TASKS]
    with server() as address:
        client = OpenAI(base_url=f"{address}/v1", api_key="none")
        print("\nquestions the model was not trained on:")
        show_answers(client, examples)
        measure(client, address, [draw(task, rng, held_out=True) for task in TASKS for _ in range(2)])


if __name__ == "__main__":
    main()
