"""The files of the repository."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent


def tracked(*suffixes: str) -> list[Path]:
    """Files that git tracks or would track; in a tree without git, all but what `make` produces."""
    if (ROOT / ".git").exists():
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    else:
        made = {".venv", "build", "dist", "__pycache__", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".hypothesis"}
        files = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
        names = [str(path) for path in files if not made & set(path.parts) and ".egg-info" not in str(path)]
    paths = [ROOT / name for name in sorted(names)]
    return [path for path in paths if path.is_file() and (not suffixes or path.suffix in suffixes)]
