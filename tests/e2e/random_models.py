"""Random models of the families, for whoever sends many requests: `python -m tests.e2e.random_models FOLDER`."""

import sys
from pathlib import Path

from tests.e2e import first_token
from tests.e2e.dream import make_wild_dream
from tests.e2e.sdar import make_wild_sdar
from tests.e2e.wild import make_wild_checkpoint

MIXING = 0.1
"""See `wild.make_wild_checkpoint`: of drafts some come true, and others do not."""


def make_all(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    make_wild_checkpoint(folder / "llada", MIXING)
    make_wild_dream(folder / "dream", MIXING)
    make_wild_sdar(folder / "sdar", MIXING)
    for family in first_token.CONFIGS:
        first_token.make_wild(family, folder / family, MIXING)


if __name__ == "__main__":
    make_all(Path(sys.argv[1]))
