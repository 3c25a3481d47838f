"""Files of order rankers: safetensors, with what they were calibrated for in the header. Read without torch.

The header's metadata has `readiness`, which the ranker adds to, and `provenance`, as a draft graph's file has them.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load, save

from vllm_dllm.config import DllmConfig
from vllm_dllm.draft.graph_schema import ModelShape, Provenance, ReadinessSchema
from vllm_dllm.draft.provenance import fit_warnings
from vllm_dllm.draft.ranker_shape import Weights, weight_shapes
from vllm_dllm.draft.readiness import Readiness
from vllm_dllm.errors import ConfigError, did_you_mean_file

MAX_WIDTH = 256
MAX_FILE_BYTES = 4 << 20
FORMAT = "vllm-dllm order ranker 1"

_ADVICE = "give the path of a file that 'vllm-dllm calibrate --ranker' wrote"


@dataclass(frozen=True, slots=True)
class RankerFile:
    """An order ranker, and where it comes from.

    Attributes:
        weights: float32.
        readiness: what it adds to.
        provenance: as a draft graph's.
        source: path of the file.
    """

    weights: Weights
    readiness: Readiness
    provenance: Provenance
    source: str = ""


def save_ranker(file: RankerFile, path: Path) -> None:
    """Write a file, whole or not at all."""
    metadata = {
        "format": FORMAT,
        "readiness": json.dumps(asdict(file.readiness)),
        "provenance": file.provenance.model_dump_json(),
    }
    temporary = path.with_name(path.name + ".new")
    temporary.write_bytes(save(dict(file.weights), metadata))
    temporary.replace(path)


def load_ranker(path: str | Path) -> RankerFile:
    """Read a file.

    Raises: ConfigError naming the file, what is wrong with it, what is allowed and what to do.
    """
    where = str(path) or "''"
    if not str(path) or not Path(path).is_file():
        raise ConfigError(f"ranker {where} is not a file; {did_you_mean_file(path, _ADVICE)}")
    try:
        content = Path(path).read_bytes() if Path(path).stat().st_size <= MAX_FILE_BYTES else None
    except OSError as error:
        raise ConfigError(f"ranker {where} cannot be read ({error.strerror}); check its permissions") from None
    if content is None:
        raise ConfigError(f"ranker {where} is larger than {MAX_FILE_BYTES} bytes, so it is no order ranker; {_ADVICE}")
    try:
        weights = load(content)
        with safe_open(path, "np") as opened:
            metadata = opened.metadata() or {}
    except (SafetensorError, KeyError, ValueError, OSError) as error:  # of a dtype or a shape that numpy has not, too
        raise ConfigError(f"ranker {where} is not a safetensors file ({error}); {_ADVICE}") from None
    if metadata.get("format") != FORMAT:
        raise ConfigError(
            f"ranker {where} has the format {metadata.get('format')!r}, allowed is {FORMAT!r}; train it anew with "
            "'vllm-dllm calibrate --ranker'"
        )
    _check_weights(weights, where)
    try:
        readiness = ReadinessSchema.model_validate_json(metadata.get("readiness", ""))
        provenance = Provenance.model_validate_json(metadata.get("provenance", ""))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join([error.title, *map(str, first["loc"])])
        raise ConfigError(
            f"ranker {where} does not say what it was calibrated for ({field}: {first['msg']}); train it anew with "
            "'vllm-dllm calibrate --ranker'"
        ) from None
    return RankerFile(weights, Readiness(**readiness.model_dump()), provenance, where)


def _check_weights(weights: Weights, where: str) -> None:
    """Check names, shapes, types and values. Raises: ConfigError."""
    width = weights["read.bias"].shape[0] if weights.get("read.bias", np.zeros(())).ndim == 1 else 0
    found = {name: array.shape for name, array in weights.items()}
    if not 1 <= width <= MAX_WIDTH or found != weight_shapes(width):
        raise ConfigError(
            f"ranker {where} has the tensors {found}, allowed are {weight_shapes(width or MAX_WIDTH)} of a width of 1 "
            f"to {MAX_WIDTH}; {_ADVICE}"
        )
    for name, array in weights.items():
        if array.dtype != np.float32:
            raise ConfigError(f"ranker {where}: {name} is {array.dtype}, allowed is float32; {_ADVICE}")
        if not np.isfinite(array).all():
            raise ConfigError(
                f"ranker {where}: {name} has values that are no finite numbers, which no training leaves; train it "
                "anew with 'vllm-dllm calibrate --ranker'"
            )


def check_ranker(
    file: RankerFile,
    settings: DllmConfig,
    graph_readiness: Readiness,
    *,
    model: str | None = None,
    family: str | None = None,
    shape: ModelShape | None = None,
) -> list[str]:
    """Tell in what a ranker's calibration differed from a server; a difference costs speed, never a token.

    Args:
        file: the ranker.
        settings, model, family, shape: of the server, as in `graph_file.check_fit`.
        graph_readiness: of the server's draft graph.
    """
    where = f"ranker {file.source}"
    warnings = fit_warnings(
        file.provenance, settings, where=where, model=model, family=family, shape=shape, makes="ranker"
    )
    if file.readiness != graph_readiness:
        warnings.append(
            f"{where} was not calibrated together with this server's draft graph, whose nodes were chosen by another "
            "order, so fewer drafts may be accepted; give the graph that the same 'vllm-dllm calibrate --ranker' wrote"
        )
    return warnings
