"""Requests with policies in torch code, of a user too, and what their plain statements make of them."""

import dataclasses
import functools
import os
import random
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch

from tests.e2e.rig import Case, Oracle
from tests.unmask.torch_policies import Own, drawn, net_files, rule_of
from vllm_dllm.reference.decode import KvPolicy
from vllm_dllm.reference.rules import Canvas, Look, best, generate, masked, write
from vllm_dllm.unmask import registry
from vllm_dllm.unmask.registry import BUILT_IN, changes_tokens

PAGE = Path(__file__).parents[2] / "docs/add-a-policy.md"
BLOCK = 8
SETTINGS = {"block_length": BLOCK, **net_files(BLOCK)}


@dataclasses.dataclass(frozen=True)
class TorchCase(Case):
    """A request with a policy in torch code."""

    own: Own = dataclasses.field(default_factory=lambda: Own("local_leap"))

    def options(self) -> dict[str, Any]:
        """What the request says to its policy."""
        taken = {"threshold": self.own.threshold, "steps": self.own.steps * self.num_blocks}
        options = {name: taken[name] for name in rule_of(self.own.policy).takes}
        return options | {f"{self.own.policy}_{name}": value for name, value in self.own.values}

    def sampling_params(self, **changes: Any) -> Any:
        options = {"policy": self.own.policy, **self.options()}
        extra = {f"dllm_{name}": value for name, value in options.items()}
        return super().sampling_params(**{"extra_args": extra, **changes})

    @property
    def num_blocks(self) -> int:
        return -(-self.max_tokens // BLOCK)

    def expected(self, oracle: Oracle) -> tuple[list[int], int]:
        """Return what the plain statement generates, and in how many steps."""
        eos = oracle.model.config.eos_token_id
        ends = (eos, *(token for token in oracle.end_ids if token != eos))
        rule = rule_of(self.own.policy).of(self.own, BLOCK, self.num_blocks, ends, len(self.prompt))
        length, prompt = self.num_blocks * BLOCK, torch.tensor(self.prompt)
        made = generate(oracle.model, prompt, gen_length=length, block_length=BLOCK, rule=rule, kv=KvPolicy("dual"))
        return made.tokens[: self.max_tokens], made.nfe


def cases(seed: int) -> list[TorchCase]:
    rng = random.Random(seed)
    made = []
    for policy in BUILT_IN:
        prompt = tuple(rng.randrange(4, 100) for _ in range(rng.choice([3, 8, 21])))
        max_tokens = rng.choice([13, 16, 24])
        own = dataclasses.replace(drawn(policy, rng), steps=rng.choice([2, 4, 8]))
        made.append(TorchCase(prompt, max_tokens, own=own, seed=own.seed))
    return made


@dataclasses.dataclass
class Patient:
    """The page's policy, position by position."""

    steps: int
    threshold: float
    last: dict[int, int] = dataclasses.field(default_factory=dict)
    stayed: dict[int, int] = dataclasses.field(default_factory=dict)

    def step(self, canvas: Canvas, looks: Sequence[Look]) -> Canvas:
        for place, look in enumerate(looks):
            self.stayed[place] = self.stayed.get(place, 0) + 1 if self.last.get(place) == look.token else 0
            self.last[place] = look.token
        ready = [
            place
            for place in masked(canvas)
            if self.stayed[place] >= self.steps and looks[place].confidence >= self.threshold
        ]
        return write(canvas, looks, ready or best(masked(canvas), [look.confidence for look in looks], 1))


@dataclasses.dataclass(frozen=True)
class PatientCase(Case):
    """A request with this policy."""

    patient_steps: int = 2

    def sampling_params(self, **changes: Any) -> Any:
        extra = {"dllm_policy": "patient", "dllm_patient_steps": self.patient_steps, "dllm_threshold": self.threshold}
        return super().sampling_params(**{"extra_args": extra, **changes})

    def expected(self, oracle: Oracle) -> tuple[list[int], int]:
        """Return what the plain statement generates, and in how many steps."""
        length, prompt = -(-self.max_tokens // BLOCK) * BLOCK, torch.tensor(self.prompt)
        rule = partial(Patient, self.patient_steps, self.threshold)
        made = generate(oracle.model, prompt, gen_length=length, block_length=BLOCK, rule=rule, kv=KvPolicy("dual"))
        return made.tokens[: self.max_tokens], made.nfe


def patient_cases() -> list[PatientCase]:
    return [
        PatientCase((5, 6 + i, 7), (24, 13)[i % 2], threshold=(0.05, 0.3)[i // 3], patient_steps=i % 3)
        for i in range(6)
    ]


def handful(seed: int) -> list[TorchCase | PatientCase]:
    """Requests with policies of different kinds: nets, kept state, tokens that change, ends that move, a user's."""
    kinds = ("local_leap", "saber", "eotp", "dit_confidence", "ccd", "learn2pd", "editing")
    return [*(case for case in cases(seed) if case.own.policy in kinds), *patient_cases()[1:4]]


def write_package(site: Path, others: Mapping[str, str] = MappingProxyType({})) -> None:
    """Install the page's package into a folder for packages.

    Args:
        site: the folder.
        others: policies that it offers besides: name -> source of a module, which has it by the name in capitals.
    """
    example = PAGE.parents[1] / "examples/own_policy"
    blocks = dict(re.findall(r"^```(python|toml)\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL))
    assert blocks == {
        "python": (example / "patient_policy.py").read_text(),
        "toml": (example / "pyproject.toml").read_text(),
    }
    project = tomllib.loads(blocks["toml"])["project"]
    offered = dict(project["entry-points"][registry.GROUP])
    (site / "patient_policy.py").write_text(blocks["python"])
    for name, source in others.items():
        (site / f"{name}_policy.py").write_text(source)
        offered[name] = f"{name}_policy:{name.upper()}"
    info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = [f"[{registry.GROUP}]", *(f"{name} = {where}" for name, where in offered.items())]
    (info / "entry_points.txt").write_text("\n".join(lines))


@contextmanager
def offered_by(site: Path) -> Iterator[None]:
    """Have this process, and those that it starts, find the packages of a folder."""
    caches = [each for each in vars(registry).values() if isinstance(each, functools._lru_cache_wrapper)]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        patch.setenv("PYTHONPATH", str(site), prepend=os.pathsep)
        for cache in caches:
            cache.cache_clear()
        yield
    for cache in caches:
        cache.cache_clear()


def check_own(oracle: Oracle, own: Sequence[TorchCase | PatientCase], replies: Sequence[tuple[list[int], Any]]) -> int:
    """Compare tokens and steps with those of the plain statements.

    Args:
        oracle: has the model.
        own: the requests.
        replies: of each its tokens, and what the server counted of it.

    Returns: how many drafts came true.
    """
    for case, (found, took) in zip(own, replies, strict=True):
        (expected, whole), steps = case.expected(oracle), took["nfe"] + took["accepted"]
        assert found == expected, case
        # An answer may end within its last block, where no token changes; the plain statement decides all of it.
        is_kept = isinstance(case, PatientCase) or changes_tokens(case.own.policy)
        assert steps <= whole if case.max_tokens % BLOCK and not is_kept else steps == whole, case
    return sum(took["accepted"] for _, took in replies)
