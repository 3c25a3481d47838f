"""Serve the small models of this checkout with `vllm serve`, without and with Spiffy, and talk to them.

Prints some answers, then for four settings of each model how many answers are right, the tokens per second, the
forwards per token and the accepted drafts, whether Spiffy changed any text (the exit status is 1 if it did), and how
long each stage took. It leaves a page that shows how an answer was denoised, and draws that. `make demo` runs it.
"""

import argparse
import contextlib
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from denoising_picture import draw
from openai import OpenAI

from vllm_dllm.studio.page import recorded_page
from vllm_dllm.studio.record import Question, record

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "training"))
from tasks import TASKS, Example  # noqa: E402 - an example's module, not a package
from tasks import draw as draw_example  # noqa: E402

MODEL = "tiny"
MAX_TOKENS = 64
BUILD = HERE.parent / "build"
PICTURE = BUILD / "denoising.svg"
PAGE = BUILD / "denoising.html"
START_TIMEOUT_S = 240
QUESTIONS_PER_TASK = 3
SPIFFY = " + Spiffy"
STATIC: dict[str, object] = {"dllm_policy": "static"}
THRESHOLD: dict[str, object] = {"dllm_policy": "threshold", "dllm_threshold": 0.9}
DYNAMIC: dict[str, object] = {"dllm_policy": "dynamic", "dllm_threshold": 0.9}
MODELS = {
    "LLaDA": (HERE / "tiny_llada", {"static": STATIC, "threshold": THRESHOLD}),
    "SDAR": (HERE / "tiny_sdar", {"static": STATIC, "dynamic": DYNAMIC}),
}
"""Name: folder, and the policies to show. A policy is an option of a request, so one server serves them all."""


@dataclass(frozen=True)
class Result:
    """What a setting made of the questions."""

    texts: list[str]
    num_tokens: int
    seconds: float
    nfe: int  # forwards, refreshes included
    accepted: int  # drafts


@dataclass
class Stages:
    """What is going on, and how long it took."""

    begin: float
    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Announce a stage, and time it."""
        begin = time.monotonic()
        print(f"\n[{begin - self.begin:4.0f} s] {name}", flush=True)
        yield
        self.seconds[name] = time.monotonic() - begin

    def show(self) -> None:
        """Print a line per stage."""
        print("\nseconds:")
        for name, seconds in {**self.seconds, "all": time.monotonic() - self.begin}.items():
            print(f"  {name:44} {seconds:5.0f}")


_BEFORE = r"^(?:\(\w+ pid=\d+\) )?(?:[A-Z]+ \d\d-\d\d [\d:]+ \[[^]]*\] ?)?"
"""What vLLM writes in front of a line: the process, and level, time and place."""
_CAUSES = (
    rf"{_BEFORE}((?:\w+\.)*\w*(?:Error|Exception|Unavailable|Exit)(?:: .*)?)$",
    rf"{_BEFORE}((?:vllm\S*|usage|\S*python\S*).*: error: .*)$",
)
"""An exception as a traceback ends, and a wrong option."""


def first_cause(log: str) -> str | None:
    """Return the line of a server's log that names why it did not start; None where no line does.

    An exception is reported by the process that it ends, and then by those that waited for it: the first is the cause.
    """
    found = [match for cause in _CAUSES if (match := re.search(cause, log, re.MULTILINE))]
    if not found:
        return None
    first = min(found, key=re.Match.start)
    _, following, *_ = [*log[first.end() :].split("\n", 2), ""]
    is_pydantic = re.search(r"\d validation errors? for \S+$", first[1])  # says on the next line what is wrong
    return f"{first[1]}: {re.sub(_BEFORE, '', following).strip()}" if is_pydantic else first[1]


@dataclass(frozen=True)
class Server:
    """A running `vllm serve`."""

    process: "subprocess.Popen[bytes]"
    log: Path
    address: str

    def wait_until_ready(self) -> OpenAI:
        """Return a client as soon as the server answers; exit with what its log says when it does not."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while self.process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.address}/health", timeout=2)
                return OpenAI(base_url=f"{self.address}/v1", api_key="none")
            time.sleep(0.2)
        why = f"within {START_TIMEOUT_S} s" if self.process.poll() is None else f"(status {self.process.returncode})"
        log = self.log.read_text(errors="replace")
        cause = first_cause(log)
        said = f"the end of {self.log}:\n{log[-4000:]}" if cause is None else f"{cause}\nall that it says: {self.log}"
        sys.exit(f"the server did not start {why}; {said}")

    def stop(self) -> None:
        """End the process; after SIGTERM a server without requests ends within seconds."""
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()


def check_folder(folder: Path) -> None:
    """Make the folder of logs and pictures; exit where nothing can be written into it, before anything starts."""
    try:
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        sys.exit(
            f"the demo's logs and pictures go to {folder}, which cannot be written ({error}); use a writable checkout"
        )


def free_ports(count: int) -> list[int]:
    """Return different ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def start(folder: Path, port: int, log: Path, *options: str) -> Server:
    """Begin to run `vllm serve` on the checkpoint of a folder."""
    command = [
        str(Path(sys.executable).with_name("vllm")),
        *("serve", str(folder / "checkpoint"), "--served-model-name", MODEL),
        *("--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-num-seqs", "16"),
        *("--kv-cache-memory-bytes", str(128 << 20), *options),
    ]
    print("$", " ".join(command), flush=True)
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    return Server(process, log, f"http://127.0.0.1:{port}")


@contextlib.contextmanager
def servers(name: str, stages: Stages) -> Iterator[list[OpenAI]]:
    """Yield clients of a model's servers, without and with Spiffy, which run until the block ends.

    They start at the same time, as a start keeps one core busy.
    """
    folder, _ = MODELS[name]
    settings = {"": (), "-spiffy": ("--speculative-config", str(folder / "spiffy.json"))}
    running: list[Server] = []
    try:
        with stages.stage(f"{name}: start of both servers"):
            for port, (suffix, options) in zip(free_ports(len(settings)), settings.items(), strict=True):
                running.append(start(folder, port, BUILD / f"demo-{name.lower()}{suffix}.log", *options))
            clients = [server.wait_until_ready() for server in running]
        yield clients
    finally:
        for server in running:
            server.process.terminate()
        for server in running:
            server.stop()


def show_answers(client: OpenAI, examples: list[Example]) -> None:
    """Stream one answer per task."""
    print("questions the model was not trained on:")
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
        if drafted := results.get(name + SPIFFY):
            num_different = sum(a != b for a, b in zip(result.texts, drafted.texts, strict=True))
            verdict = "identical" if num_different == 0 else f"{num_different} DIFFERENT"
            print(f"texts of '{name}' and '{name}{SPIFFY}': {verdict}")
            total += num_different
    return total


def run(name: str, stages: Stages, shown: list[Example], asked: list[Example]) -> dict[str, Result]:
    """Serve a model without and with Spiffy; returns what each setting made of the questions."""
    results = {}
    with servers(name, stages) as (plain, drafted), stages.stage(f"{name}: questions"):
        show_answers(plain, shown)
        measure(drafted, shown, STATIC)  # the first requests pay for what is made once, as the shown ones do
        for policy, values in MODELS[name][1].items():
            # One after another: each has the machine to itself.
            results[f"{name} {policy}"] = measure(plain, asked, values)
            results[f"{name} {policy}{SPIFFY}"] = measure(drafted, asked, values)
        if name == "LLaDA":
            recording = record(
                str(drafted.base_url).removesuffix("/v1/"), Question(question_to_draw(shown), MAX_TOKENS)
            )
            PAGE.write_text(recorded_page(recording), "utf-8")
            print(f"open this page to watch it denoise: {PAGE}")
    return results


def question_to_draw(shown: list[Example]) -> str:
    """Return the one whose denoising is shown."""
    return next(example.question for example in shown if example.task == "json")


def main() -> int:
    """Run the demonstration; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--setup-seconds", type=float, default=0, help="what `make demo` took to set up")
    setup_s = parser.parse_args().setup_seconds
    check_folder(BUILD)
    stages = Stages(time.monotonic() - setup_s, {"set-up": setup_s})
    rng = random.Random(0)
    shown = [draw_example(task, rng, held_out=True) for task in TASKS]
    asked = [draw_example(task, rng, held_out=True) for task in TASKS for _ in range(QUESTIONS_PER_TASK)]
    results = {}
    for name in MODELS:
        results |= run(name, stages, shown, asked)
    with stages.stage("picture of the denoising"):
        forwards = draw(question_to_draw(shown), MODELS["LLaDA"][0] / "spiffy.json", PICTURE)
        print(f"{', '.join(f'{name}: {n}' for name, n in forwards.items())} forwards: {PICTURE}")
    show(results, asked)
    num_different = count_differences(results)
    stages.show()
    return int(num_different > 0)


if __name__ == "__main__":
    sys.exit(main())
