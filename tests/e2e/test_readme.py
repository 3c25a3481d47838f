"""The offline example of the README works as a script, with a small model in place of the published one."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.engine, pytest.mark.slow("readme"), pytest.mark.xdist_group("server")]


def test_the_offline_example_is_a_script(tmp_path: Path) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    small = {
        "GSAI-ML/LLaDA-8B-Instruct": str(ROOT / "examples/tiny_llada/checkpoint"),
        "4 << 30": "128 << 20",
        "What is 17 * 23?": "46 + 27 = ?",
    }
    for published, replacement in small.items():
        assert code.count(published) == 1
        code = code.replace(published, replacement)
    script = tmp_path / "offline.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "73"
