"""A thousand changes of config.json: each is served as the reference computes it, or refused by name."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.in_process import TINY, load, logits_of, make_model, read_config, reference_of, vllm_alone
from tests.models.mutations import Mutation, changes_of, draw
from vllm_dllm.errors import ConfigError
from vllm_dllm.models.checkpoint_fields import SPECIAL_IDS
from vllm_dllm.plugin import register

# float32 rounding, carried through up to three layers into logits of size 1 to 20
ROUNDING = {"rtol": 1e-4, "atol": 2e-4}
NUM_DAILY = 150


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for checkpoints, in a process that can make models."""
    path = tmp_path_factory.mktemp("mutations")
    with vllm_alone(path):
        yield path


def verdict(mutation: Mutation, folder: Path) -> str:
    """Return `served` or `refused`; raises AssertionError where it is neither as it has to be."""
    given = (TINY[mutation.family], mutation.fields) if mutation.by_overrides else (mutation.config, {})
    if mutation.names:
        with pytest.raises(ConfigError) as refusal:
            read_config(folder, *given)
        assert any(name in str(refusal.value) for name in mutation.names), (mutation, refusal.value)
        return "refused"
    model_config = read_config(folder, *given)
    config = model_config.hf_config
    reference = reference_of(mutation.config, folder)
    model = make_model(config)
    load(model, reference.state_dict())
    rope = reference.config.rope
    assert model_config.max_model_len == longest(mutation, rope.factor)
    assert model_config.max_model_len <= config.num_positions
    assert model_config.get_sliding_window() is None
    assert (config.mask_token_id, config.eos_token_id) == (
        reference.config.mask_token_id,
        reference.config.eos_token_id,
    )
    ids = torch.randint(0, 40, (model_config.max_model_len,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(
            logits_of(model, ids), reference(ids)[0], **ROUNDING, msg=lambda m: f"{mutation}: {m}"
        )
    return "served"


def longest(mutation: Mutation, factor: float) -> int:
    """Return the longest row that is asked for: YaRN's `max_position_embeddings` says it, of others the factor too."""
    name = "max_sequence_length" if mutation.family == "llada" else "max_position_embeddings"
    rope = mutation.config.get("rope_parameters") or mutation.config.get("rope_scaling") or {}
    is_yarn = "yarn" in (rope.get("rope_type"), rope.get("type"))
    return int(mutation.config[name] * (1 if is_yarn else factor))


def check(seeds: range, folder: Path) -> None:
    counts = Counter(verdict(draw(seed), folder) for seed in seeds)
    assert min(counts["served"], counts["refused"]) > len(seeds) // 4


def test_mutations(folder: Path) -> None:
    check(range(NUM_DAILY), folder)


@pytest.mark.slow("fields")
def test_more_mutations(folder: Path) -> None:
    check(range(NUM_DAILY, 1000), folder)


@pytest.mark.slow("fields")
@pytest.mark.parametrize("family", TINY)
def test_every_change_alone(family: str, folder: Path) -> None:
    for change in changes_of(family):
        if change.only != "overrides":
            verdict(Mutation(family, (change,), fields=change.fields), folder)


@pytest.mark.parametrize("family", TINY)
def test_overrides_mend_a_file(family: str, folder: Path) -> None:
    """What a refusal advises works, whatever the file says."""
    broken = {"mask_token_id": None, "quux": 3, "rope_scaling": {"rope_type": "llama3"}, "rms_norm_eps": "small"}
    mended = {"mask_token_id": 3, "quux": None, "rope_scaling": {"type": "linear", "factor": 2.0}, "rms_norm_eps": 1e-5}
    config = read_config(folder, TINY[family] | broken, mended).hf_config
    assert (config.mask_token_id, config.rms_norm_eps, config.rope_parameters["factor"]) == (3, 1e-5, 2.0)
    for name in broken:
        with pytest.raises(ConfigError, match="rope_type" if name == "rope_scaling" else name):
            read_config(folder, TINY[family] | {name: broken[name]})


@pytest.mark.parametrize("family", TINY)
def test_overrides_of_rotation_replace_what_they_say_and_nothing_else(family: str, folder: Path) -> None:
    linear, dynamic = ({"rope_type": kind, "factor": 2.0} for kind in ("linear", "dynamic"))
    asked: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = [
        ({"rope_scaling": linear}, {"rope_theta": 500.0}, linear | {"rope_theta": 500.0}),
        ({"rope_scaling": linear}, {"rope_scaling": dynamic}, dynamic | {"rope_theta": 10000.0}),
        ({"rope_scaling": linear}, {"rope_scaling": None}, {"rope_type": "default", "rope_theta": 10000.0}),
        ({"rope_parameters": linear}, {"rope_scaling": dynamic | {"rope_theta": 5.0}}, dynamic | {"rope_theta": 5.0}),
        # a file that is mended in other ways keeps its scaling
        (
            {"mask_token_id": 99, "rope_scaling": linear},
            {"mask_token_id": 3, "rope_theta": 500.0},
            linear | {"rope_theta": 500.0},
        ),
    ]
    # How much of a head is rotated is a field of its own, which transformers puts beside them.
    kept = {name: value for name, value in TINY[family].items() if name == "partial_rotary_factor"}
    for file, overrides, expected in asked:
        assert read_config(folder, TINY[family] | file, overrides).hf_config.rope_parameters == expected | kept
    for overrides, name in (
        ({"rope_theta": 6.0, "rope_parameters": linear | {"rope_theta": 5.0}}, "rope_theta"),
        ({"rope_scaling": linear, "rope_parameters": dynamic}, "rope_type"),
    ):
        with pytest.raises(ConfigError, match=f"{name}.* allowed is one value"):
            read_config(folder, TINY[family], overrides)


@pytest.mark.parametrize("spiffy", [None, {"method": "spiffy"}], ids=["plain", "spiffy"])
@pytest.mark.parametrize("name", SPECIAL_IDS)
def test_special_ids_are_refused_before_an_engine_starts(name: str, spiffy: object, tmp_path: Path) -> None:
    """One ConfigError, as `vllm serve` and `LLM` show it, whether drafts are asked for or not."""
    from vllm.engine.arg_utils import EngineArgs

    register()
    for fields in TINY.values():
        for value in (-1, 64, True, "3", *([None] if name == "mask_token_id" else [])):
            (tmp_path / "config.json").write_text(json.dumps(fields | {name: value}))
            arguments = EngineArgs(model=str(tmp_path), skip_tokenizer_init=True, speculative_config=spiffy)
            with pytest.raises(ConfigError, match=f"^{name} in the checkpoint's config.json is "):
                arguments.create_engine_config()


@pytest.mark.parametrize("value", [64, -1, [1, 64], 1.5])
def test_special_ids_of_generation_configs(value: object, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(ConfigError, match=r"eos_token_id in .*generation_config.json is .*64 tokens"):
        read_config(tmp_path, TINY["sdar"])
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 63]}))
    read_config(tmp_path, TINY["sdar"])
