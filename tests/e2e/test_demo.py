"""`make demo`'s script runs: its answers are right, its figures are there, Spiffy changes no text, and it draws."""

import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.studio.streams import recording_of

pytestmark = [pytest.mark.engine, pytest.mark.slow("demo"), pytest.mark.xdist_group("server")]

ROOT = Path(__file__).parents[2]
PICTURE = ROOT / "build/denoising.svg"
PAGE = ROOT / "build/denoising.html"


@pytest.fixture(scope="module")
def printed() -> str:
    PICTURE.unlink(missing_ok=True)
    PAGE.unlink(missing_ok=True)
    command = [sys.executable, str(ROOT / "examples/demo.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_answers_are_right(printed: str) -> None:
    assert len(re.findall(r"-> .* right$", printed, re.MULTILINE)) >= 11  # of six questions to each model


def test_table_has_a_line_per_setting(printed: str) -> None:
    lines = re.findall(r"^  (\S.*\S) +(\d+)/(\d+) +([\d.]+) +([\d.]+) +(\d+)$", printed, re.MULTILINE)
    rows = {line[0].strip(): line[1:] for line in lines}
    settings = ["LLaDA static", "LLaDA threshold", "SDAR static", "SDAR dynamic"]
    assert sorted(rows) == sorted([*settings, *(f"{setting} + Spiffy" for setting in settings)])
    assert all(int(right) >= 0.9 * int(num_questions) for right, num_questions, *_ in rows.values())
    nfe = {name: float(row[3]) for name, row in rows.items()}
    accepted = {name: int(row[4]) for name, row in rows.items()}
    assert nfe["LLaDA threshold"] < nfe["LLaDA static"]
    assert nfe["SDAR dynamic"] < nfe["SDAR static"]
    for setting in settings:
        assert accepted[setting] == 0
        assert nfe[f"{setting} + Spiffy"] <= nfe[setting]
    for setting in ("LLaDA static", "SDAR static"):
        assert accepted[f"{setting} + Spiffy"] > 0
        assert nfe[f"{setting} + Spiffy"] < 0.8 * nfe[setting]


@pytest.mark.parametrize("setting", ["LLaDA static", "LLaDA threshold", "SDAR static", "SDAR dynamic"])
def test_texts_are_identical(printed: str, setting: str) -> None:
    assert f"texts of '{setting}' and '{setting} + Spiffy': identical" in printed


def test_each_stage_is_announced_and_timed(printed: str) -> None:
    stages = re.findall(r"^\[ *\d+ s\] (.*)$", printed, re.MULTILINE)
    assert len(stages) == 5
    times = printed.split("seconds:\n")[1]
    assert re.findall(r"^  (\S.*\S) +\d+$", times, re.MULTILINE) == ["set-up", *stages, "all"]


def test_picture_shows_both(printed: str) -> None:
    without, drafted = re.search(r"without drafts: (\d+), Spiffy: (\d+) forwards", printed).groups()
    assert (int(without), int(drafted) < 12) == (16, True)
    root = ElementTree.parse(PICTURE).getroot()
    texts = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {f"without drafts: {without} forwards", f"Spiffy: {drafted} forwards", "accepted draft"} <= set(texts)
    assert texts.count("emu") > 2  # the answer's last word, in either half
    assert int(root.get("width")) <= 830


def test_a_recording_is_left_behind(printed: str) -> None:
    assert f"watch it denoise: {PAGE}" in printed
    runs = recording_of(PAGE.read_text())["runs"]
    taken = [run["events"][-2][1]["kv_transfer_params"]["dllm"] for run in runs]
    texts = ["".join(c["delta"].get("content") or "" for _, e in run["events"] for c in e["choices"]) for run in runs]
    assert texts[0] == texts[1] != ""
    assert (taken[0]["nfe"] < taken[1]["nfe"], taken[0]["accepted"] > 0, taken[1]["proposed"]) == (True, True, 0)
