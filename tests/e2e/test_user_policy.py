"""The example of docs/add-a-policy.md, installed as a package and served with drafts, beside native policies."""

import dataclasses
import functools
import re
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.rig import Case, mixed_cases, random_graph, run_outputs, shared_engine, speculation, step_all
from tests.e2e.test_torch_policies import SETTINGS
from vllm_dllm.reference.decode import KvPolicy
from vllm_dllm.reference.rules import Canvas, Look, best, generate, masked, write
from vllm_dllm.unmask import registry

pytestmark = [pytest.mark.engine, pytest.mark.xdist_group("policies in torch code")]

PAGE = Path(__file__).parents[2] / "docs/add-a-policy.md"
BROKEN = """
from vllm_dllm.policy import Decision, TorchPolicy

def decide(seen, state):
    if (seen.step > 1).any():
        raise ZeroDivisionError("no such luck")
    return Decision(seen.canvas)

BROKEN = TorchPolicy(decide)
"""


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


@pytest.fixture(scope="module")
def _installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Install the page's package, and one that is broken."""
    site = tmp_path_factory.mktemp("site")
    example = Path(__file__).parents[2] / "examples/own_policy"
    blocks = dict(re.findall(r"^```(python|toml)\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL))
    assert blocks == {
        "python": (example / "patient_policy.py").read_text(),
        "toml": (example / "pyproject.toml").read_text(),
    }
    project = tomllib.loads(blocks["toml"])["project"]
    offered = project["entry-points"][registry.GROUP] | {"broken": "broken_policy:BROKEN"}
    (site / "patient_policy.py").write_text(blocks["python"])
    (site / "broken_policy.py").write_text(BROKEN)
    info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = [f"[{registry.GROUP}]", *(f"{name} = {where}" for name, where in offered.items())]
    (info / "entry_points.txt").write_text("\n".join(lines))
    caches = [each for each in vars(registry).values() if isinstance(each, functools._lru_cache_wrapper)]
    sys.path.insert(0, str(site))
    for cache in caches:
        cache.cache_clear()
    yield
    sys.path.remove(str(site))
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def llm(mild: Path, _installed: None) -> Any:
    config = speculation(random_graph(12, 12, 8), 5)
    return shared_engine(mild, SETTINGS, speculative_config=config, max_model_len=1024, max_num_batched_tokens=8192)


def own(case: Case, policy: str, **options: object) -> Any:
    """Ask for a policy that `Case` does not know."""
    extra = {"dllm_policy": policy, **{f"dllm_{name}": value for name, value in options.items()}}
    return case.sampling_params(extra_args=extra)


def test_the_pages_example_is_served_beside_native_policies(llm: Any, mild_oracle: Any) -> None:
    native = mixed_cases(8, seed=5)[:6]
    patient = [Case(prompt=(5, 6 + i, 7), max_tokens=(24, 13)[i % 2]) for i in range(6)]
    options = [{"patient_steps": i % 3, "threshold": (0.05, 0.3)[i // 3]} for i in range(6)]
    prompts = [{"prompt_token_ids": list(case.prompt)} for case in (*native, *patient)]
    params = [case.sampling_params() for case in native]
    params += [own(case, "patient", **its) for case, its in zip(patient, options, strict=True)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    assert tokens[:6] == [mild_oracle.tokens(case, SETTINGS) for case in native]
    accepted = 0
    for case, its, found, output in zip(patient, options, tokens[6:], outputs[6:], strict=True):
        made = generate(
            mild_oracle.model,
            torch.tensor(case.prompt),
            gen_length=-(-case.max_tokens // 8) * 8,
            block_length=8,
            rule=lambda its=its: Patient(its["patient_steps"], its["threshold"]),  # type: ignore[misc]
            kv=KvPolicy("dual"),
        )
        took = output.kv_transfer_params["dllm"]
        assert (found, took["nfe"] + took["accepted"]) == (made.tokens[: case.max_tokens], made.nfe)
        accepted += took["accepted"]
    assert accepted > 0


def test_a_request_at_which_a_policy_raises_ends_alone(llm: Any, mild_oracle: Any) -> None:
    cases = mixed_cases(8, seed=6)[:3]
    prompts = [{"prompt_token_ids": list(case.prompt)} for case in (cases[0], *cases)]
    params = [own(cases[0], "broken"), *(case.sampling_params() for case in cases)]
    first, *others = llm.generate(prompts, params, use_tqdm=False)
    assert (first.outputs[0].finish_reason, list(first.outputs[0].token_ids)) == ("error", [])
    assert [list(o.outputs[0].token_ids) for o in others] == [mild_oracle.tokens(case, SETTINGS) for case in cases]
    assert run_outputs(llm, cases[:1])[0].outputs[0].finish_reason == "length"


def test_a_preempted_request_ends_in_the_same_tokens(llm: Any) -> None:
    """Its block begins anew, and with it what the policy kept of it."""
    case = Case(prompt=(5, 6, 7), max_tokens=24)

    @dataclasses.dataclass(frozen=True)
    class Own(Case):
        def sampling_params(self, **changes: Any) -> Any:
            return own(case, "patient", patient_steps=2, threshold=0.05)

    cases = [Own(prompt=case.prompt, max_tokens=case.max_tokens)]

    def preempt(number: int, llm: Any) -> None:
        if number in (3, 9):
            assert llm.llm_engine.reset_prefix_cache(reset_running_requests=True)

    assert step_all(llm, cases, preempt) == step_all(llm, cases)
