"""Serve the small models of this checkout with `vllm serve`, without and with Spiffy, and talk to them.

Prints some answers, then for four settings of each model how many answers are right, the tokens per second, the
forwards per token and the accepted drafts, and whether Spiffy changed any text: the exit status is 1 if it did. Then it
draws how an answer comes about. `make demo` runs it.
"""

import contextlib
import random
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from denoising_picture import draw
from openai import OpenAI

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "training"))
from tasks import TASKS, Example  # noqa: E402 - an example's module, not a package
from tasks import draw as draw_example  # noqa: E402

MODEL = "tiny"
MAX_TOKENS = 64
BUILD = HERE.parent / "build"
LOG = BUILD / "demo-server.log"
PICTURE = BUILD / "denoising.svg"
START_TIMEOUT_S = 240
QUESTIONS_PER_TASK = 3
STATIC: dict[str, object] = {"dllm_policy": "static"}
THRESHOLD: dict[str, object] = {"dllm_policy": "threshold", "dllm_threshold": 0.9}
DYNAMIC: dict[str, object] = {"dllm_policy": "dynamic", "dllm_threshold": 0.9}
MODELS = {
    "LLaDA": (HERE / "tiny_llada", {"static": STATIC, "threshold": THRESHOLD}),
    "SDAR": (HERE / "tiny_sdar", {"static": STATIC, "dynamic": DYNAMIC}),
}
"""Name: folder, and the unmasking policies to show."""


@dataclass(frozen=True)
class Result:
    """What a setting made of the questions."""

    texts: list[str]
    num_tokens: int
    seconds: float
    nfe: int  # forwards, refreshes included
    accepted: int  # drafts


@contextlib.contextmanager
def server(folder: Path, *options: str) -> Iterator[OpenAI]:
    """Run `vllm serve` on the checkpoint of a folder until the block ends; yields a client of it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        str(Path(sys.executable).with_name("vllm")),
        *("serve", str(folder / "checkpoint"), "--served-model-name", MODEL),
        *("--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-num-seqs", "16"),
        *("--kv-cache-memory-bytes", str(128 << 20), *options),
    ]
    print("$", " ".join(command), flush=True)
    BUILD.mkdir(exist_ok=True)
    with LOG.open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_until_ready(process, f"http://127.0.0.1:{port}")
            yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
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


def show_answers(client: OpenAI, examples: list[Example]) -> None:
    """Stream one answer per task."""
    print("\nquestions the model was not trained on:")
    for example in examples:
        stream = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": example.question}],
            max_tokens=MAX_TOKENS,
            stream=True,
        )
        answer = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        print(f"  {example.question:34} -> {answer:40} {'right' if answer == example.answer else 'WRONG'}", flush=True)


def measure(client: OpenAI, examples: list[Example], policy: dict[str, object]) -> Result:
    """Ask the questions one after another."""
    begin = time.monotonic()
    replies = [
        client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": example.question}],
            max_tokens=MAX_TOKENS,
            extra_body={"vllm_xargs": policy},
        )
        for example in examples
    ]
    seconds = time.monotonic() - begin
    taken = [reply.model_extra["kv_transfer_params"]["dllm"] for reply in replies]
    return Result(
        texts=[str(reply.choices[0].message.content) for reply in replies],
        num_tokens=sum(reply.usage.completion_tokens for reply in replies),
        seconds=seconds,
        nfe=sum(numbers["nfe"] for numbers in taken),
        accepted=sum(numbers["accepted"] for numbers in taken),
    )


def show(results: dict[str, Result], examples: list[Example]) -> None:
    """Print a line per setting."""
    print(f"\n{len(examples)} questions, one after another:")
    print(f"  {'setting':26} {'right':>6} {'tokens/s':>9} {'forwards/token':>15} {'accepted drafts':>16}")
    for name, result in results.items():
        right = sum(text == example.answer for text, example in zip(result.texts, examples, strict=True))
        speed, nfe = result.num_tokens / result.seconds, result.nfe / result.num_tokens
        print(f"  {name:26} {f'{right}/{len(examples)}':>6} {speed:9.1f} {nfe:15.2f} {result.accepted:16}")


def count_differences(results: dict[str, Result]) -> int:
    """Print of each setting whether Spiffy gave the same texts; returns how many differ."""
    total = 0
    for name, result in results.items():
        if drafted := results.get(f"{name} + Spiffy"):
            num_different = sum(a != b for a, b in zip(result.texts, drafted.texts, strict=True))
            verdict = "identical" if num_different == 0 else f"{num_different} DIFFERENT"
            print(f"texts of '{name}' and '{name} + Spiffy': {verdict}")
            total += num_different
    return total


def run(name: str, shown: list[Example], asked: list[Example]) -> dict[str, Result]:
    """Serve a model without and with Spiffy; returns what each setting made of the questions."""
    folder, policies = MODELS[name]
    results = {}
    for suffix in ("", " + Spiffy"):
        options = ("--speculative-config", str(folder / "spiffy.json")) if suffix else ()
        print()
        with server(folder, *options) as client:
            if suffix:
                measure(client, shown, STATIC)  # the first requests pay for what is made once, as the shown ones do
            else:
                show_answers(client, shown)
            for policy, values in policies.items():
                results[f"{name} {policy}{suffix}"] = measure(client, asked, values)
    return results


def main() -> int:
    """Run the demonstration; returns the exit status."""
    rng = random.Random(0)
    shown = [draw_example(task, rng, held_out=True) for task in TASKS]
    asked = [draw_example(task, rng, held_out=True) for task in TASKS for _ in range(QUESTIONS_PER_TASK)]
    results = {}
    for name in MODELS:
        results |= run(name, shown, asked)
    show(results, asked)
    num_different = count_differences(results)
    forwards = draw(asked[-QUESTIONS_PER_TASK - 1].question, MODELS["LLaDA"][0] / "spiffy.json", PICTURE)
    print(
        f"how an answer comes about ({', '.join(f'{name}: {n}' for name, n in forwards.items())} forwards): {PICTURE}"
    )
    return int(num_different > 0)


if __name__ == "__main__":
    sys.exit(main())
