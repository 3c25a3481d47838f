"""Serve a model under mixed load, compare its answers and watch the memory of the server's processes.

Requests come over HTTP, whole or streamed, some from clients that leave early, some wrong in every way: of all
policies, lengths and temperatures, with edits of their logits, under constraints, with one choice or several. Each is
first sent alone, and must get the same answer again and again, in other company; an answer under a constraint has to
meet it, by `jsonschema`, `re` and `==`. Now and then all that run are preempted. The number in flight may change from
minute to minute, so that the budget of drafts goes up and down. Once a minute a line tells the resident memory of each
process and the outcomes so far. At the end the server has to be idle, with no page in use, and to answer as at
the start.

The exit status is 1 if a process grew by more than `--growth` in the last third, or if anything but what was refused
alone, too, went wrong:

    python -m benchmarks.soak --model CHECKPOINT --speculative-config '{"method": "spiffy"}'
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import httpx
import psutil
from transformers import AutoTokenizer

from benchmarks.fuzz.bad import MODEL, Bad
from benchmarks.fuzz.calls import Answer, Call, draw_calls, fitted, send, shows_canvases
from benchmarks.fuzz.requests import POLICIES, Shape, whole_ids

LEFT, REFUSED, ANSWERED, ERROR, WRONG = "left early", "refused", "answered", "errors", "wrong"
SAMPLE_EVERY_S = 5.0
PREEMPT_EVERY_S = 2.0
AGAIN = 64
"""Calls that are sent alone again at the end."""


@dataclass
class Soak:
    """What a run counts.

    Attributes:
        calls: the requests that are sent.
        alone: what came of each when it was sent alone: tokens, or the message that refused it.
        outcomes: of requests.
        resident: process name -> MiB, one number per sample.
        in_flight: requests that may be in flight now.
        left: requests that may still be sent.
        messages: of errors.
    """

    calls: list[Call | Bad]
    left: float
    alone: list[Answer | str] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    resident: dict[str, list[float]] = field(default_factory=dict)
    in_flight: int = 0
    messages: list[str] = field(default_factory=list)

    def judge(self, index: int, answer: Answer | str) -> str:
        """Compare an answer with that to the same request alone; returns the outcome."""
        if answer == self.alone[index]:
            return REFUSED if isinstance(answer, str) else ANSWERED
        call = self.calls[index]
        sent = call.content.decode(errors="replace") if isinstance(call, Bad) else json.dumps(call.body)
        self.messages.append(f"wrong: {sent} gave {self.alone[index]} alone, then {answer}")
        return WRONG

    def fail(self, error: Exception, index: int | None = None) -> None:
        """Count an error, of a request's answer where its index is given."""
        self.outcomes[ERROR] += 1
        call = None if index is None else self.calls[index]
        sent = json.dumps(call.body) if isinstance(call, Call) else ""
        self.messages.append(f"{error!r} {sent}")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a checkpoint")
    parser.add_argument("--minutes", type=int, default=30, help="at most")
    parser.add_argument("--count", type=float, default=float("inf"), help="requests under load, at most")
    parser.add_argument(
        "--in-flight", default="16,16,4,1", help="requests in flight, minute by minute, again and again"
    )
    parser.add_argument("--growth", type=float, default=0.03, help="share by which memory may grow in the last third")
    parser.add_argument("--max-model-len", type=int, default=512)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--requests", type=int, default=300, help="different ones, sent alone first")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", default="1", help="VLLM_DLLM_CHECK of the server")
    parser.add_argument("--log", type=Path, default=Path("soak.log"), help="where the server writes")
    parser.add_argument("--policies", default=",".join(POLICIES), help="unmasking policies of the requests")
    parser.add_argument("--additional-config", help="of the server")
    known, rest = parser.parse_known_args()
    given = [] if known.additional_config is None else ["--additional-config", known.additional_config]
    known.server_arguments = [*given, *rest]  # all others are the server's
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
    environment = os.environ | {"VLLM_SERVER_DEV_MODE": "1", "VLLM_DLLM_CHECK": arguments.check}
    with arguments.log.open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


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


def draw(arguments: argparse.Namespace) -> list[Call | Bad]:
    """Draw the requests."""
    settings = json.loads(arguments.additional_config or "{}").get("dllm", {})
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    longest = min(96, arguments.max_model_len // 4)
    shape = Shape(len(tokenizer), whole_ids(tokenizer), settings.get("block_length", 1), longest)
    return draw_calls(arguments.seed, arguments.requests, shape, arguments.policies.split(","))


async def send_alone(soak: Soak, client: httpx.AsyncClient, index: int) -> Answer | str:
    """Return what comes of a request that is sent alone."""
    try:
        return await send(client, soak.calls[index])
    except (RuntimeError, httpx.HTTPError) as error:
        soak.fail(error, index)
        return repr(error)


async def client_loop(index: int, soak: Soak, client: httpx.AsyncClient, seed: int) -> None:
    """Send one request after the other, while so many may be in flight."""
    rng = random.Random(f"{seed}/{index}")
    while soak.left > 0:
        if index >= soak.in_flight:
            await asyncio.sleep(0.5)
            continue
        soak.left -= 1
        chosen = rng.randrange(len(soak.calls))
        leave_after_s = rng.uniform(0.01, 1.0) if rng.random() < 0.1 else None
        stream = rng.choice(["", "", "usual", "denoising"])
        if stream == "denoising" and not shows_canvases(soak.calls[chosen]):
            stream = "usual"
        try:
            answer = await asyncio.wait_for(send(client, soak.calls[chosen], stream), leave_after_s)
            soak.outcomes[soak.judge(chosen, answer)] += 1
        except TimeoutError:
            soak.outcomes[LEFT] += 1
        except (RuntimeError, httpx.HTTPError) as error:
            soak.fail(error, chosen)
            await asyncio.sleep(1)


async def preempt_loop(soak: Soak, client: httpx.AsyncClient) -> None:
    """Preempt all that run, again and again."""
    while True:
        await asyncio.sleep(PREEMPT_EVERY_S)
        try:
            reply = await client.post("/reset_prefix_cache", params={"reset_running_requests": True})
            reply.raise_for_status()
        except httpx.HTTPError as error:
            soak.fail(error)


def sample(soak: Soak, server: psutil.Process) -> None:
    """Add the present memory of the server and of its engine's processes, which have names.

    Others come and go, as those that build a constraint: what these take says nothing, and they may be gone by now.
    """
    soak.resident.setdefault("API server", []).append(server.memory_info().rss / 2**20)
    for child in server.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            named = re.findall(r"Engine ?Core|Worker\w*", child.name().replace("::", " "))
            if named:
                soak.resident.setdefault(named[0], []).append(child.memory_info().rss / 2**20)


async def metric(client: httpx.AsyncClient, name: str) -> float:
    """Return a metric of the server, summed over its labels."""
    text = (await client.get("/metrics")).text
    return sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE))


async def drafts_of_steps(client: httpx.AsyncClient) -> Counter[int]:
    """Return the number of steps by their budget of drafts; empty without speculation."""
    text = (await client.get("/metrics")).text
    found = re.findall(r'^vllm:dllm_steps_total\{.*budget="(\d+)".*\} (\S+)$', text, re.MULTILINE)
    return Counter({int(budget): int(float(number)) for budget, number in found})


async def load(soak: Soak, client: httpx.AsyncClient, server: psutil.Process, arguments: argparse.Namespace) -> None:
    """Send all requests, in the company that the minute allows; print a line each minute."""
    in_flight = [int(number) for number in arguments.in_flight.split(",")]
    clients = [asyncio.create_task(client_loop(i, soak, client, arguments.seed)) for i in range(max(in_flight))]
    preempting = asyncio.create_task(preempt_loop(soak, client))
    begin_s, minute = time.monotonic(), 0
    while minute < arguments.minutes and not all(task.done() for task in clients):
        soak.in_flight = in_flight[minute % len(in_flight)]
        await asyncio.wait(clients, timeout=SAMPLE_EVERY_S)
        sample(soak, server)
        if time.monotonic() < begin_s + 60 * (minute + 1):
            continue
        minute += 1
        tell(soak, f"minute {minute}, {soak.in_flight} in flight")
    soak.left = 0
    for task in (preempting, *clients):
        task.cancel()
    for result in await asyncio.gather(preempting, *clients, return_exceptions=True):
        if isinstance(result, Exception):
            soak.fail(result)


def tell(soak: Soak, when: str) -> None:
    """Print memory and outcomes so far."""
    mib = ", ".join(f"{name} {values[-1]:.0f}" for name, values in soak.resident.items())
    counts = ", ".join(f"{soak.outcomes[each]} {each}" for each in (ANSWERED, WRONG, LEFT, REFUSED, ERROR))
    print(f"{when}: MiB: {mib}; {counts}", flush=True)


async def check_idle(soak: Soak, client: httpx.AsyncClient) -> None:
    """Check that nothing is left of anybody, and that some requests get alone what they got at the start."""
    gauges = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    deadline_s = time.monotonic() + 60
    while any([await metric(client, name) for name in gauges]) and time.monotonic() < deadline_s:
        await asyncio.sleep(0.5)
    left = {name: value for name in gauges if (value := await metric(client, name))}
    if left:
        soak.fail(RuntimeError(f"left of the load: {left}"))
    for index in range(min(AGAIN, len(soak.calls))):
        soak.outcomes[soak.judge(index, await send_alone(soak, client, index))] += 1


async def run(arguments: argparse.Namespace, port: int, server: subprocess.Popen[bytes]) -> Soak:
    """Send each request alone, then all of them under load, then some alone again."""
    soak = Soak(draw(arguments), arguments.count)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=16)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=300, limits=limits) as client:
        await wait_until_ready(client, server, arguments.log)
        for index, call in enumerate(soak.calls):
            soak.alone.append(await send_alone(soak, client, index))
            again = fitted(call, soak.alone[-1])
            if again is not None:
                soak.calls[index] = again
                soak.alone[-1] = await send_alone(soak, client, index)
        num_refused = sum(isinstance(answer, str) for answer in soak.alone)
        print(f"alone: {len(soak.alone) - num_refused} answers, {num_refused} refused", flush=True)
        await load(soak, client, psutil.Process(server.pid), arguments)
        await check_idle(soak, client)
        tell(soak, "end")
        steps = await drafts_of_steps(client)
        print("steps by drafts:", ", ".join(f"{budget}: {steps[budget]}" for budget in sorted(steps)) or "no drafts")
        print("preemptions:", int(await metric(client, "vllm:num_preemptions_total")))
    return soak


def growth(values: list[float]) -> float:
    """Return by which share the last minute's mean exceeds that of the first minute of the last third."""
    per_minute = round(60 / SAMPLE_EVERY_S)
    third = values[-max(len(values) // 3, 2 * per_minute) :]
    per_minute = min(per_minute, len(third) // 2 or 1)
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
        not soak.outcomes[ERROR] + soak.outcomes[WRONG]
        and soak.outcomes[ANSWERED] > len(soak.calls)
        and max(grown.values()) <= arguments.growth
    )
    numbers = {"outcomes": soak.outcomes, "growth": grown}
    print(json.dumps({"passed": bool(is_good), **numbers}))
    sys.exit(not is_good)


if __name__ == "__main__":
    main()
