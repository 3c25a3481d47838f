"""Serve a model for a while under mixed load, compare its answers and watch the memory of the server's processes.

Requests of random lengths, policies and temperatures, streamed or not, come over HTTP, some of them from clients that
leave early, some with an option that must be refused. Each comes again and again, in other company, and must get the
tokens of its first answer. The number in flight changes from minute to minute, so that the budget of drafts goes up
and down. Once a minute a line tells the resident memory of each process and the outcomes so far. The exit status is 1
if a process grew by more than `--growth` in the last third, or if anything but the expected refusals went wrong:

    python -m benchmarks.soak --model CHECKPOINT --speculative-config '{"method": "spiffy"}'
"""

import argparse
import asyncio
import contextlib
import json
import random
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from statistics import fmean
from typing import Any

import httpx
import psutil

POLICIES = ("static", "threshold", "random", "factor")
LEFT, REFUSED, ANSWERED, ERROR, WRONG = "left early", "refused", "answered", "errors", "wrong"
SAMPLE_EVERY_S = 5.0
MODEL = "soak"


@dataclass
class Soak:
    """What a run counts.

    Attributes:
        outcomes: of requests.
        resident: process name -> MiB, one number per sample.
        in_flight: requests that may be in flight now.
        messages: of errors.
        requests: the bodies that are sent.
        first: index of a request -> the tokens of its first answer.
        compared: answers that were compared with one before.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    resident: dict[str, list[float]] = field(default_factory=dict)
    in_flight: int = 0
    messages: list[str] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    first: dict[int, list[int]] = field(default_factory=dict)
    compared: int = 0

    def judge(self, index: int, tokens: list[int]) -> str:
        """Compare an answer with the first one to the same request; returns the outcome."""
        if index not in self.first:
            self.first[index] = tokens
            return ANSWERED
        self.compared += 1
        if tokens == self.first[index]:
            return ANSWERED
        self.messages.append(f"wrong: {json.dumps(self.requests[index])} gave {self.first[index]}, then {tokens}")
        return WRONG


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a checkpoint")
    parser.add_argument("--minutes", type=int, default=30)
    parser.add_argument(
        "--in-flight", default="16,16,4,1", help="requests in flight, minute by minute, again and again"
    )
    parser.add_argument("--growth", type=float, default=0.03, help="share by which memory may grow in the last third")
    parser.add_argument("--max-model-len", type=int, default=512)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--requests", type=int, default=300, help="number of different requests")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, default=Path("soak.log"), help="where the server writes")
    parser.add_argument("--policies", default=",".join(POLICIES), help="unmasking policies of the requests")
    known, rest = parser.parse_known_args()
    known.server_arguments = rest  # all others are the server's
    return known


def start_server(arguments: argparse.Namespace, port: int) -> subprocess.Popen[bytes]:
    """Start `vllm serve`."""
    most = max(map(int, arguments.in_flight.split(",")))
    command = [
        *(str(Path(sys.executable).with_name("vllm")), "serve", arguments.model, "--served-model-name", MODEL),
        *("--host", "127.0.0.1", "--port", str(port), "--dtype", arguments.dtype, "--max-num-seqs", str(most)),
        *("--max-model-len", str(arguments.max_model_len), "--kv-cache-memory-bytes", str(256 << 20)),
        *arguments.server_arguments,
    ]
    with arguments.log.open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


async def wait_until_ready(client: httpx.AsyncClient, server: subprocess.Popen[bytes], log: Path) -> None:
    """Return when the server answers.

    Raises: RuntimeError when it ended instead.
    """
    while server.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            await client.get("/health")
            return
        await asyncio.sleep(1)
    raise RuntimeError(f"the server ended at start; its messages are in {log}")


def random_request(rng: random.Random, policies: list[str], max_model_len: int) -> dict[str, Any]:
    """Make a request of any kind; one in fifty has an option that is refused."""
    max_tokens = rng.choice([1, 8, 32, 64, 128])
    longest = max_model_len - max_tokens - 64  # room for whole blocks
    policy = rng.choice(policies)
    if rng.random() < 0.02:
        policy = "none"
    return {
        "model": MODEL,
        "prompt": [rng.randrange(4, 200) for _ in range(rng.randint(1, rng.choice([33, longest])))],
        "max_tokens": max_tokens,
        "temperature": rng.choice([0.0, 0.0, 0.7, 1.0]),
        "top_p": rng.choice([1.0, 0.9]),
        "seed": rng.randrange(1 << 30),
        "ignore_eos": rng.random() < 0.5,
        "return_token_ids": True,
        "vllm_xargs": {"dllm_policy": policy},
    }


async def send(
    client: httpx.AsyncClient, body: dict[str, Any], *, is_stream: bool, leave_after_s: float | None
) -> list[int] | str:
    """Send a request and read its answer, or leave; returns its tokens, or else the outcome.

    Raises: RuntimeError for an answer that is not what the request asks for.
    """

    async def read() -> tuple[int, str]:
        async with client.stream("POST", "/v1/completions", json={**body, "stream": is_stream}) as reply:
            return reply.status_code, (await reply.aread()).decode()

    try:
        status, text = await asyncio.wait_for(read(), leave_after_s)
    except TimeoutError:
        return LEFT
    if body["vllm_xargs"]["dllm_policy"] == "none":
        if status != HTTPStatus.BAD_REQUEST or "dllm_policy is 'none'" not in text:
            raise RuntimeError(f"not refused: {status} {text[:300]}")
        return REFUSED
    if status != HTTPStatus.OK or '"error"' in text:
        raise RuntimeError(f"status {status}: {text[:300]}")
    chunks = tuple(re.findall(r"^data: (\{.*)$", text, re.MULTILINE)) if is_stream else (text,)
    choices = [choice for chunk in chunks for choice in json.loads(chunk)["choices"]]
    if not choices or not choices[-1]["finish_reason"] or (is_stream and not text.rstrip().endswith("data: [DONE]")):
        raise RuntimeError(f"not whole: {text[-300:]}")
    return [token for choice in choices for token in choice["token_ids"]]


async def client_loop(index: int, soak: Soak, client: httpx.AsyncClient, seed: int) -> None:
    """Send one request after the other, while so many may be in flight."""
    rng = random.Random(f"{seed}/{index}")
    while True:
        if index >= soak.in_flight:
            await asyncio.sleep(0.5)
            continue
        chosen = rng.randrange(len(soak.requests))
        leave_after_s = rng.uniform(0.05, 2.0) if rng.random() < 0.1 else None
        try:
            answer = await send(
                client, soak.requests[chosen], is_stream=rng.random() < 0.5, leave_after_s=leave_after_s
            )
            outcome = answer if isinstance(answer, str) else soak.judge(chosen, answer)
        except (RuntimeError, httpx.HTTPError) as error:
            outcome = ERROR
            soak.messages.append(repr(error))
            await asyncio.sleep(1)
        soak.outcomes[outcome] += 1


def sample(soak: Soak, server: psutil.Process) -> None:
    """Add the present memory of the server and all its descendants."""
    processes = [("API server", server), *((child.name(), child) for child in server.children(recursive=True))]
    for name, process in processes:
        name = (re.findall(r"Engine ?Core|Worker\w*", name.replace("::", " ")) or [name])[0]
        title = " ".join(process.cmdline()) if name.startswith("python") else ""
        if "resource_tracker" in title:
            continue
        soak.resident.setdefault(name, []).append(process.memory_info().rss / 2**20)


async def drafts_of_steps(client: httpx.AsyncClient) -> Counter[int]:
    """Return the number of steps by their budget of drafts; empty without speculation."""
    text = (await client.get("/metrics")).text
    found = re.findall(r'^vllm:dllm_steps_total\{.*budget="(\d+)".*\} (\S+)$', text, re.MULTILINE)
    return Counter({int(budget): int(float(number)) for budget, number in found})


async def run(arguments: argparse.Namespace, port: int, server: subprocess.Popen[bytes]) -> Soak:
    """Load the server; print a line each minute."""
    soak = Soak()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=16)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=300, limits=limits) as client:
        await wait_until_ready(client, server, arguments.log)
        in_flight = [int(number) for number in arguments.in_flight.split(",")]
        rng, policies = random.Random(arguments.seed), arguments.policies.split(",")
        soak.requests = [random_request(rng, policies, arguments.max_model_len) for _ in range(arguments.requests)]
        clients = [asyncio.create_task(client_loop(i, soak, client, arguments.seed)) for i in range(max(in_flight))]
        process = psutil.Process(server.pid)
        for minute in range(arguments.minutes):
            soak.in_flight = in_flight[minute % len(in_flight)]
            ends_at_s = time.monotonic() + 60
            while time.monotonic() < ends_at_s:
                await asyncio.sleep(SAMPLE_EVERY_S)
                sample(soak, process)
            mib = ", ".join(f"{name} {values[-1]:.0f}" for name, values in soak.resident.items())
            counts = ", ".join(f"{soak.outcomes[each]} {each}" for each in (ANSWERED, WRONG, LEFT, REFUSED, ERROR))
            print(f"minute {minute + 1}, {soak.in_flight} in flight: MiB: {mib}; {counts}", flush=True)
        steps = await drafts_of_steps(client)
        print("steps by drafts:", ", ".join(f"{budget}: {steps[budget]}" for budget in sorted(steps)) or "no drafts")
        for task in clients:
            task.cancel()
        for result in await asyncio.gather(*clients, return_exceptions=True):
            if not isinstance(result, asyncio.CancelledError):
                soak.outcomes[ERROR] += 1
                soak.messages.append(repr(result))
    return soak


def growth(values: list[float]) -> float:
    """Return by which share the last minute's mean exceeds that of the first minute of the last third."""
    per_minute = round(60 / SAMPLE_EVERY_S)
    third = values[-max(len(values) // 3, 2 * per_minute) :]
    return fmean(third[-per_minute:]) / fmean(third[:per_minute]) - 1


def main() -> None:
    """Run and judge."""
    arguments = parse_arguments()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = start_server(arguments, port)
    try:
        soak = asyncio.run(run(arguments, port, server))
    finally:
        server.terminate()
        server.wait(timeout=120)
    grown = {name: growth(values) for name, values in soak.resident.items()}
    print("growth in the last third:", ", ".join(f"{name} {share:+.1%}" for name, share in grown.items()))
    for message, number in Counter(soak.messages).most_common(10):
        print(f"error, {number} times: {message}")
    is_good = (
        not soak.outcomes[ERROR] + soak.outcomes[WRONG] and soak.compared and max(grown.values()) <= arguments.growth
    )
    numbers = {"outcomes": soak.outcomes, "compared": soak.compared, "growth": grown}
    print(json.dumps({"passed": bool(is_good), **numbers}))
    sys.exit(not is_good)


if __name__ == "__main__":
    main()
