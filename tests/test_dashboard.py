"""The dashboard for Grafana: every metric of ours is on it, and every query is one of the metrics page or of vLLM's."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
DASHBOARD = json.loads((ROOT / "deploy/grafana.json").read_text())
OURS = set(re.findall(r"^\| `(vllm:dllm_\w+)`", (ROOT / "docs/metrics.md").read_text(), re.M))
SUFFIX = re.compile(r"_(?:bucket|total)$")


def queries() -> list[str]:
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]


def shown() -> set[str]:
    return set(re.findall(r"vllm:\w+", " ".join(queries())))


def test_every_metric_of_ours_is_shown_and_none_that_is_not() -> None:
    assert len(OURS) >= 9
    assert {SUFFIX.sub("", name) for name in shown() if name.startswith("vllm:dllm_")} == {
        SUFFIX.sub("", name) for name in OURS
    }


def test_queries_are_whole() -> None:
    for query in queries():
        assert query.count("(") == query.count(")"), query
        assert "$model" in query, query
        assert not re.search(r"rate\(vllm:\w+(?<!_total)(?<!_bucket)\{", query), "rates are of counters"


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + dx, at["y"] + dy) for dx in range(at["w"]) for dy in range(at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
