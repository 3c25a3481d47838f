"""All that is replaced in vLLM is in one table, in code and in the documentation, and nothing is replaced elsewhere."""

import ast
import re

from tests.tree import ROOT
from vllm_dllm.engine.patches import PATCHES

PACKAGE = ROOT / "vllm_dllm"
APPLY = {"wrap", "add_to_module", "replaced_while"}
ONLY_HERE = "engine/patches.py"


def test_the_documentation_has_the_table() -> None:
    text = (ROOT / "docs/patches.md").read_text()
    rows = re.findall(r"^\| `([\w.:]+)` \| `(\w+)` \| (.*) \|$", text, re.MULTILINE)
    contracts = [(patch.contract.owner, patch.contract.attribute, patch.reason) for patch in PATCHES.values()]
    assert rows == contracts
    assert f"in {len(PATCHES)} places" in text


def test_every_patch_of_the_table_is_applied_and_no_other() -> None:
    applied = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in {
                "wrap",
                "add_to_module",
                "replaced_while",
            }:
                assert isinstance(node.args[0], ast.Constant), f"{path}:{node.lineno}: name the patch"
                applied.add(node.args[0].value)
    assert applied == PATCHES.keys()


def test_nothing_is_replaced_elsewhere() -> None:
    """No attribute is set on what a module imports from vLLM, by `setattr`, `__class__` or an assignment."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        imports = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("vllm.")]
        theirs = {alias.asname or alias.name for node in imports for alias in node.names}
        for node in ast.walk(tree):
            targets = node.targets if isinstance(node, ast.Assign) else []
            is_set = any(
                isinstance(target, ast.Attribute)
                and (target.attr == "__class__" or getattr(target.value, "id", None) in theirs)
                for target in targets
            )
            is_call = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setattr"
            of_theirs = is_call and getattr(node.args[0], "id", None) in theirs
            if is_set or of_theirs:
                found.append(f"{path.relative_to(PACKAGE).as_posix()}:{node.lineno}")
    assert [where for where in found if not where.startswith(ONLY_HERE)] == []


def test_a_family_s_fact_is_asked_not_compared() -> None:
    """`block_causal` is compared where the two facts are stated, and where the KV policies are."""
    stated = {"kv_settings.py", "models/interface.py", "state/kv.py"}
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if re.search(r"== \"block_causal\"", path.read_text())
    }
    assert {name for name in found if not name.startswith(("reference/", "measure/"))} <= stated
