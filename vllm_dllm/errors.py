"""What can go wrong. Each message says what was given, what is allowed and what to do, in the user's own names."""

import difflib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

LIKENESS = 0.7
"""Of two words, from which on one may be a typo of the other, as `difflib` counts: of four letters one may differ."""

STRICT_LIKENESS = 0.85
"""The same where a word that is nobody's typo belongs to somebody else."""


class ConfigError(ValueError):
    """A setting of the user that cannot work.

    Attributes:
        command: what to run next, said behind the message by `vllm-dllm`; None: the help of the command that was run.
    """

    command: str | None = None

    def __init__(self, message: str, command: str | None = None) -> None:
        super().__init__(message)
        if command is not None:
            self.command = command


class GraphError(ConfigError):
    """A draft graph, in a file or in the settings, that cannot work."""

    command = "vllm-dllm calibrate --help"


class KernelUnavailable(RuntimeError):
    """A native op that this installation or this device does not have."""


class UnsupportedVllmError(RuntimeError):
    """The installed vLLM is not one that this plugin knows how to extend."""


INSTALL_SUPPORTED = "install vLLM 0.32 or 0.33"
"""What to do then."""


class StateError(RuntimeError):
    """Scheduler and worker hold different things of a request."""


def nearest(given: object, known: Iterable[str], likeness: float = LIKENESS) -> str | None:
    """Return the known word that something looks like a typo of, or None; case and `-` for `_` count for nothing.

    A known word is no typo, whatever else is wrong with it.
    """
    words = {_folded(word): word for word in known}
    close = difflib.get_close_matches(_folded(str(given)), words, n=1, cutoff=likeness)
    return words[close[0]] if close and given not in words.values() else None


def did_you_mean(given: object, known: Iterable[str], otherwise: str) -> str:
    """Return a message's last part, what to do: take the known word that was meant, or `otherwise`."""
    meant = nearest(given, known)
    return f"did you mean {meant!r}?" if meant else otherwise


def did_you_mean_file(
    missing: str | Path,
    otherwise: str,
    words: Iterable[str] = (),
    *,
    is_meant: Callable[[Path], bool] = Path.is_file,
) -> str:
    """Do the same for the path of a file that is not there, by its folder's files and by words that stand for one.

    Equal suffixes make no names alike: of `nosuch.json` and `null.json` the rest counts.

    Args:
        missing: the path.
        otherwise: what to do where nothing is like it.
        words: what may be given instead of a path.
        is_meant: whether something in the folder may be given; `Path.is_dir` where folders are.
    """
    folder, name = Path(missing).parent, Path(missing).name
    can_look = folder.is_dir() and os.access(folder, os.R_OK | os.X_OK)
    files = [
        file
        for file in (os.listdir(folder) if can_look else [])
        if difflib.get_close_matches(_folded(Path(name).stem), [_folded(Path(file).stem)], cutoff=LIKENESS)
    ]
    return did_you_mean(name, [*filter(lambda file: is_meant(folder / file), files), *words], otherwise)


def _folded(word: str) -> str:
    return word.strip().lower().replace("-", "_")
