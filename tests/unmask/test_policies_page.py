"""docs/policies.md says of each policy what its code does."""

import re
from pathlib import Path

from vllm_dllm.config import DllmConfig
from vllm_dllm.policy_options import POLICY_ALIASES, POLICY_OPTIONS, options_of
from vllm_dllm.unmask.registry import BUILT_IN, NATIVE, parameters_of, torch_policy

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/policies.md"


def rows(heading: str) -> list[list[str]]:
    """The cells of the table under a heading, without its head."""
    text = PAGE.read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    (table,) = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)  # one, which no empty line cuts into two
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def options(cell: str) -> dict[str, str | None]:
    return {name: default or None for name, default in re.findall(r"`(\w+)`(?: \(([\d.]+)[^)]*\))?", cell)}


def test_the_table_of_policies_in_torch_code_is_that_of_the_code() -> None:
    table = rows("In torch code")
    assert [re.findall(r"`(\w+)`", row[0]) for row in table] == [[name] for name in BUILT_IN]
    for name, (_, source, _, cell, kind, drafts) in zip(BUILT_IN, table, strict=True):
        policy, found = torch_policy(name), options(cell)
        assert source == policy.source
        assert tuple(found) == options_of(name)
        assert {option: f"{its.default:g}" for option, its in parameters_of(name).items()} == {
            option: found[option] for option in parameters_of(name)
        }
        assert ("tokens change" in kind, drafts) == (policy.tokens_change, "exact")
        assert all(its.says for its in policy.parameters.values())


def test_the_names_of_the_sources_are_those_of_the_code() -> None:
    (sentence,) = re.findall(
        r"^Names of the sources are taken too: (.*?)\. ", PAGE.read_text(), re.MULTILINE | re.DOTALL
    )
    clauses = [re.findall(r"`(\w+)`", clause) for clause in re.split(r",\s+and |,\s+(?=`\w+` \(\w+\) is)", sentence)]
    assert {alias: own for *aliases, own in clauses for alias in aliases} == POLICY_ALIASES


def test_pages_count_the_policies_that_there_are() -> None:
    native, torch = len(NATIVE), len(BUILT_IN)
    assert f"[{native + torch} unmasking policies](docs/policies.md)" in (ROOT / "README.md").read_text()
    row = f"| unmasking policies | {native + torch} ({native} native, {torch} in torch code), "
    assert row in (ROOT / "docs/comparison.md").read_text()


def test_the_table_of_native_policies_is_that_of_the_code() -> None:
    defaults = DllmConfig().model_dump()
    listed = [(name, options(row[3])) for row in rows("Native") for name in re.findall(r"`(\w+)`", row[0])]
    assert [name for name, _ in listed] == sorted(NATIVE, key=[name for name, _ in listed].index)
    for name, found in listed:
        assert tuple(found) == POLICY_OPTIONS[name]
        for option, default in found.items():
            if option not in {"steps", "alg_temp"}:
                assert default == f"{defaults[option]:g}"
