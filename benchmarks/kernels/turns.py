"""Contestants of a measurement take turns, so that a machine that changes its pace changes it for all."""

import time
from collections.abc import Callable, Mapping

import torch

from vllm_dllm.measure.report import Spread

Contestant = Callable[[int], object]
"""Does the work once, on the data set of the given number."""

COLD_BYTES = 128 << 20
"""What a round reads at least: more than the last cache of the machines that are measured, so that the next round finds
its data in memory, as the layers of a model do."""


class UnequalResultsError(RuntimeError):
    """Two contestants that must give the same result did not."""


def num_data_sets(num_bytes: int) -> int:
    """Return how many sets of `num_bytes` a round reads."""
    return -(-COLD_BYTES // num_bytes)


def take_turns(
    contestants: Mapping[str, Contestant], num_sets: int, num_rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Measure each contestant once per round; the order turns round by round.

    On a GPU a turn is the replay of a CUDA graph, so that the host's part is not in it.

    Args:
        contestants: by name; each is called once before the first round.
        num_sets: data sets; a turn does the work on each.
        num_rounds: measurements of each contestant.
        device: where the work is done.

    Returns: ms for one data set, by contestant and round.
    """
    turns = {name: _turn(contestant, num_sets, device) for name, contestant in contestants.items()}
    names = list(turns)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(num_rounds):
        for place in range(len(names)):
            name = names[(number + place) % len(names)]
            times[name].append(_seconds(turns[name], device) * 1e3 / num_sets)
    return times


def ratio(times: Mapping[str, list[float]], name: str, to: str) -> Spread:
    """Compare two contestants round by round: how many times as long `name` took as `to`."""
    return Spread.of([mine / theirs for mine, theirs in zip(times[name], times[to], strict=True)])


def _turn(contestant: Contestant, num_sets: int, device: torch.device) -> Callable[[], None]:
    def turn() -> None:
        for number in range(num_sets):
            contestant(number)

    if device.type != "cuda":
        contestant(0)
        return turn
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        turn()
    torch.cuda.current_stream(device).wait_stream(stream)
    cuda_graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(cuda_graph):
        turn()
    cuda_graph.replay()
    return cuda_graph.replay


def _seconds(turn: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    turn()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin
