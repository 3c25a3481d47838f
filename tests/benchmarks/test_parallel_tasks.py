"""The tasks after ParallelBench: what is drawn can be answered, and what is wrong is found."""

import json
import random
import runpy
import sys

import pytest

from benchmarks.parallel_tasks import NEW_NAME, TASKS, draw, right

RIGHT = {
    "copy": "Ann, Bob, Cid",
    "reverse": "Cid, Bob, Ann",
    "sort": "Ann, Bob, Cid",
    "leave": "Bob, Cid",
    "join": f"Ann, Bob, Cid, {NEW_NAME}",
    "shuffle": "Bob, Cid, Ann",
    "replace": f"Ann, {NEW_NAME}, Cid",
    "latin": "ABC, BCA, CAB",
}
WRONG = {  # what tokens of several right answers come to, and others
    "copy": ["Ann, Bob", "Ann, Bob, Bob", ""],
    "reverse": ["Ann, Bob, Cid", "Cid, Bob, Bob"],
    "sort": ["Bob, Ann, Cid", "Ann, Cid, Bob"],
    "leave": ["Ann, Bob, Cid", "Cid, Bob"],
    "join": ["Ann, Bob, Cid", f"{NEW_NAME}, Ann, Bob, Cid"],
    "shuffle": ["Ann, Bob, Cid", "Bob, Bob, Ann", "Bob, Ann"],
    "replace": ["Ann, Bob, Cid", f"{NEW_NAME}, {NEW_NAME}, Cid", f"Ann, {NEW_NAME}", f"Bob, {NEW_NAME}, Cid"],
    "latin": ["ABC, ABC, CAB", "ABC, BCA", "ABC, BAC, CAB", "AB, BA", "ABC, BCA, CAB, ABC"],
}


@pytest.mark.parametrize("task", TASKS)
def test_replies_are_judged(task: str) -> None:
    line = {"task": task, "given": ["Ann", "Bob", "Cid"]}
    assert right(line, RIGHT[task])
    assert right(line, f" {RIGHT[task]}.\nThat is all.")
    assert not any(right(line, reply) for reply in WRONG[task])


@pytest.mark.parametrize("size", [2, 4, 20])
def test_questions_say_what_they_are_judged_by(size: int) -> None:
    for task in TASKS:
        its = draw(task, size, random.Random(size))
        assert len(set(its.given)) == len(its.given) == (min(size, 4) if task == "latin" else size)
        assert task == "latin" or ", ".join(its.given) in its.question
        assert "{" not in its.question


def test_a_file_of_them_is_a_file_of_prompts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["parallel_tasks", "--count", "2", "--size", "3"])
    runpy.run_module("benchmarks.parallel_tasks", run_name="__main__")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["task"] for line in lines] == [task for task in TASKS for _ in range(2)]
    assert right(lines[0], ", ".join(lines[0]["given"]))
    monkeypatch.setattr(sys, "argv", ["parallel_tasks", "--size", "21"])
    with pytest.raises(SystemExit):
        runpy.run_module("benchmarks.parallel_tasks", run_name="__main__")
    assert "--size is 21, allowed are 2 to 20" in capsys.readouterr().err
