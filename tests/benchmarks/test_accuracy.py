"""What `python -m benchmarks accuracy` judges, and of whom."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.accuracy import ALL, Judged, chosen_policies, is_right, likeness, read_lines, sections
from vllm_dllm.errors import ConfigError
from vllm_dllm.unmask.registry import BUILT_IN, NATIVE


def test_replies_are_judged_by_what_their_line_has() -> None:
    assert is_right({"answer": "88"}, " 88\n")
    assert not is_right({"answer": "88"}, "it is 88")
    story = {"answer": "48*50/100 = $24.\n#### 1,024"}
    assert is_right(story, "24 and 1000, so #### 1,024.")
    assert not is_right(story, "1024, no, 24")
    assert not is_right(story, "none")
    assert is_right({"task": "reverse", "given": ["Ann", "Bob"]}, "Bob, Ann")


def test_likeness_is_that_to_the_answers_text() -> None:
    wrong = likeness({"answer": "3*7 = 21\n#### 21"}, "3*7 = 24\n#### 24")
    assert wrong is not None
    assert 0.8 < wrong < likeness({"answer": "3*7 = 21\n#### 21"}, " 3*7 = 21\n#### 21\n") == 1.0  # type: ignore[operator]
    assert likeness({"answer": "21"}, "Ann") == 0.0
    assert likeness({"task": "reverse", "given": ["Ann", "Bob"]}, "Bob, Ann") is None


def test_a_file_that_nothing_judges_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"question": "a", "answer": "1"}\n\n{"question": "b", "answer": "2"}\n{"question": "c"}\n')
    assert [line["answer"] for line in read_lines(path, 1, 1)] == ["2"]
    with pytest.raises(ConfigError, match=r"question 3 has \['question'\]; allowed are lines with answer, and those"):
        read_lines(path, 1, 9)


def test_all_policies_are_those_whose_nets_and_tokens_are_there() -> None:
    names, out = chosen_policies(ALL, {"learn2pd_file": "net.safetensors"})
    assert {*names, *out} == {*NATIVE, *BUILT_IN}
    assert out == ["dit_confidence", "indel"]
    assert chosen_policies(ALL, {"learn2pd_file": "net.safetensors", "indel_delete": 6})[1] == ["dit_confidence"]
    assert chosen_policies("static,saber", {}) == (["static", "saber"], [])
    with pytest.raises(ConfigError, match="--policy has 'sabre'; did you mean 'saber'"):
        chosen_policies("static,sabre", {})


def test_the_tables_have_a_row_of_each_policy() -> None:
    lines = [{"task": "copy"}, {"task": "copy"}, {"task": "sort"}, {"task": "sort"}]
    found = {
        "static": Judged([True] * 4, None, 8.0, None, 0, 8.0),
        "ass": Judged([True, False, False, False], None, 3, 2.5, 9, 8),
    }
    summary, by_task = sections(found, lines)
    assert [(row["right"], row["forwards"], row["with Spiffy"]) for row in summary.rows] == [
        ("100 %", 8.0, ""),
        ("25 %", 3, 2.5),
    ]
    assert by_task.rows[1] == {"policy": "ass", "copy": "50 %", "sort": "0 %"}
    assert "alike" not in summary.rows[0]
    found["ass"] = replace(found["ass"], alike=0.5)
    (alone,) = sections(found, [{"answer": "1"}] * 4)
    assert alone.rows[1]["alike"] == "50 %"
