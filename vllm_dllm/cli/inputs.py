"""What commands are given: checkpoints to read and paths to write, checked before anything that takes time."""

import importlib.util
import json
import shlex
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from vllm_dllm.draft.picture import SUFFIXES
from vllm_dllm.errors import ConfigError, did_you_mean_file
from vllm_dllm.models.interface import FAMILY_BY_ARCHITECTURE, ModelFamily, family_said

Dtype = Literal["auto", "half", "float16", "bfloat16", "float", "float32"]
"""Of vLLM's engines."""


def read_config(model: str) -> dict[str, Any]:
    """Read config.json of a checkpoint in a folder, or of one on the hub by its name.

    Raises: ConfigError.
    """
    folder = Path(model)
    todo = "give the name or the path of a checkpoint"
    if not model.strip():
        raise ConfigError(f"model is {model!r}; allowed are folders of checkpoints and names on the hub; {todo}")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"model {model!r} is a file; allowed are folders of checkpoints and names on the hub; {todo}")
    is_path = folder.is_dir() or folder.is_absolute() or model.count("/") > 1 or model.startswith((".", "~"))
    if is_path and not folder.is_dir():
        meant = did_you_mean_file(model, todo, is_meant=Path.is_dir)
        raise ConfigError(f"model {model!r} is not there: no such folder; {meant}")
    path = folder / "config.json" if is_path else _download(model, "config.json")
    try:
        config = json.loads(path.read_text("utf-8"))
    except OSError as error:
        reason = f"config.json in this folder: {error.strerror}"
        raise ConfigError(f"the configuration of model {model!r} cannot be read ({reason}); {todo}") from None
    except ValueError as error:
        raise ConfigError(f"the configuration of model {model!r} cannot be read ({error}); {todo}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"the configuration of model {model!r} is no JSON object; {todo}")
    return config


def _download(model: str, name: str) -> Path:
    """Find a file of a model on the hub, in the cache where there is no hub."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(model, name))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split("\n", 1)[0].split())
        otherwise = "give the path of a checkpoint, or download it where the hub can be reached"
        todo = did_you_mean_file(model, otherwise, is_meant=Path.is_dir)
        raise ConfigError(
            f"the configuration of model {model!r} cannot be read: there is no folder of this name, and the hub does "
            f"not give it ({reason}); {todo}",
            f"hf download {shlex.quote(model)}",
        ) from None


def family_for(model: str, config: Mapping[str, Any]) -> ModelFamily:
    """Return the family of a checkpoint.

    Raises: ConfigError for a model that is none of ours.
    """
    family = family_said(config)
    if family is None:
        raise ConfigError(
            f"model {model!r} has architectures {config.get('architectures')!r}, allowed are "
            f"{', '.join(FAMILY_BY_ARCHITECTURE)}; give another model"
        )
    return family


def check_file(option: str, path: Path) -> None:
    """Check that a file can be written.

    Raises: ConfigError.
    """
    folder = path.absolute().parent
    if path.is_dir():
        raise ConfigError(f"{option} is {str(path)!r}, but this is a folder; give the path of a file")
    if not folder.is_dir():
        raise ConfigError(
            f"{option} is {str(path)!r}, but there is no folder {folder}; make it",
            f"mkdir -p {shlex.quote(str(folder))}",
        )
    _check_writable(option, folder)


def make_folder(option: str, path: Path) -> None:
    """Make a folder to write into, if need be.

    Raises: ConfigError.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror
        raise ConfigError(
            f"{option} is {str(path)!r}, but no folder can be made there ({reason}); give another"
        ) from None
    _check_writable(option, path)


def check_picture(option: str, path: Path) -> None:
    """Check that a picture can be drawn into a file.

    Raises: ConfigError.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"{option} is {str(path)!r}; allowed are paths that end in {' or '.join(SUFFIXES)}")
    check_file(option, path)
    check_matplotlib()


def check_matplotlib() -> None:
    """Check that pictures can be drawn.

    Raises: ConfigError.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "pictures need matplotlib, which is not installed: install it", "pip install 'vllm-dllm[tools]'"
        )


def _check_writable(option: str, folder: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"{option} is in {folder}, where no file can be written ({error.strerror}); give another folder"
        ) from None
