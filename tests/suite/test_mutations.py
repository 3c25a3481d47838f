"""The list of mutations fits the code: what a row changes is there, still compiles, and has a test."""

import ast

import pytest

from scripts.mutations import ROOT, Mutation, load_mutations

MUTATIONS = load_mutations()


def test_each_change_applies_once_and_compiles() -> None:
    assert len(MUTATIONS) > 40
    for mutation in MUTATIONS:
        text = (ROOT / mutation.file).read_text()
        changed = mutation.apply(text)
        compile(changed, mutation.file, "exec")
        assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(text)), mutation.change


def test_each_test_exists() -> None:
    wrong = []
    for mutation in MUTATIONS:
        file, _, name = mutation.test.partition("::")
        tree = ast.parse((ROOT / file).read_text()) if (ROOT / file).is_file() else ast.Module([], [])
        if name not in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}:
            wrong.append(f"{mutation.change}: {mutation.test}")
    assert not wrong, "tests that do not exist"


def test_no_change_is_listed_twice() -> None:
    assert len({mutation.change for mutation in MUTATIONS}) == len(MUTATIONS)
    assert len({(mutation.file, mutation.old, mutation.new) for mutation in MUTATIONS}) == len(MUTATIONS)


def test_rows_that_no_longer_fit_are_refused() -> None:
    row = Mutation("no more", "file.py", old="a = 1", new="a = 2", test="tests/test_file.py::test_a")
    assert row.apply("a = 1\n") == "a = 2\n"
    for text in ("b = 1\n", "a = 1\na = 1\n"):
        with pytest.raises(ValueError, match="must be there once"):
            row.apply(text)
