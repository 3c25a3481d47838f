"""2,000 mutated graph files: each loads as a valid graph or is refused by name."""

import copy
import json
import random
from pathlib import Path

import pytest

from tests.draft.example_graph import FILE
from vllm_dllm.draft.graph import MAX_NODES
from vllm_dllm.draft.graph_file import (
    dump_graph,
    load_graph,
    parse_graph,
)
from vllm_dllm.errors import GraphError

ODD_VALUES = [
    *(None, True, False, 0, -1, 1, 2, 7, 8, 64, 65, 1023, 1024, 2**31, 2**53, 2**64, 10**300, -(10**300)),
    *(0.0, -0.0, 0.5, 1.0, 1.5, 1e308, float("inf"), float("-inf"), float("nan"), 5e-324),
    *("", "0", "null", "static", "\ud800", "\0", "é" * 9, "𝄞\u202e", "x" * 5000, "2026-02-30", "2026-02-28T12:00:00"),
    *([], {}, [[]], [{}], [0], [[0, 0]], [[0, 0], [1, 0]], {"formula": [[2, 0]]}, {"": 0}),
]


def places(value: object, path: tuple = ()) -> list[tuple]:
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, child in children for place in places(child, (*path, key)))]


def mutate(value: dict, rng: random.Random) -> object:
    """Replace, remove, repeat, add or swap something at a random place."""
    *path, last = rng.choice(places(value)[1:])
    parent = value
    for key in path:
        parent = parent[key]
    kind = rng.choice(["replace", "replace", "remove", "add", "swap", "wrap", "retype", "move"])
    if kind == "remove":
        del parent[last]
    elif kind == "add" and isinstance(parent, list):
        parent.insert(last, copy.deepcopy(rng.choice([parent[last], rng.choice(ODD_VALUES)])))
    elif kind == "add":
        parent[rng.choice(["count", "formula", "nodes", "a.b[0]", "\ud800", "", "threshold"])] = rng.choice(ODD_VALUES)
    elif kind == "swap":
        other = rng.choice(list(range(len(parent)) if isinstance(parent, list) else parent))
        parent[last], parent[other] = parent[other], parent[last]
    elif kind == "wrap":
        parent[last] = rng.choice([[parent[last]], {"value": parent[last]}])
    elif kind == "retype":
        parent[last] = rng.choice([str, bool, repr, lambda old: [old] * 70])(parent[last])
    elif kind == "move" and isinstance(parent[last], int | float):
        parent[last] += rng.choice([-1, 1, 0.5, 2**40])
    else:
        parent[last] = copy.deepcopy(rng.choice(ODD_VALUES))
    return value


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Cut, flip, insert or repeat some bytes."""
    start = rng.randrange(len(data))
    end = min(len(data), start + rng.choice([1, 2, 10, 100]))
    noise = rng.choice(
        [b"", rng.randbytes(3), data[start:end] * 2, b"\xef\xbb\xbf", b"[" * 3000, b"NaN", b"-", b"9" * 400]
    )
    return rng.choice([data[:start], data[:start] + noise + data[end:], data[:start] + noise + data[start:]])


@pytest.mark.parametrize("seed", range(4))
def test_500_mutated_files_load_or_are_refused(seed: int, tmp_path: Path) -> None:
    rng, path = random.Random(seed), tmp_path / "graph.json"
    messages: list[str] = []
    for _ in range(500):
        value = json.loads(dump_graph(FILE))
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            value = mutate(value, rng)
        data = json.dumps(value).encode()
        path.write_bytes(mutate_bytes(data, rng) if rng.random() < 0.3 else data)
        try:
            file = load_graph(path)
        except GraphError as refused:
            messages.append(str(refused))
            continue
        assert parse_graph(json.loads(dump_graph(file))) == file
        assert all(file.graph.parents)
        assert len(file.graph.depths) == len(file.graph) <= MAX_NODES
    assert all(message.startswith(str(path)) for message in messages)
    assert 25 < len(messages) < 475
