"""All policies in torch code in one batch, with drafts, and after a preemption: engine == plain statements, in fp32."""

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.rig import Case, Oracle, mixed_cases, random_graph, run_outputs, shared_engine, speculation, step_all
from tests.unmask.torch_policies import Own, drawn, net_files, rule_of
from vllm_dllm.reference.decode import KvPolicy
from vllm_dllm.reference.rules import generate
from vllm_dllm.unmask.registry import BUILT_IN, changes_tokens

pytestmark = [pytest.mark.engine, pytest.mark.xdist_group("policies in torch code")]

BLOCK = 8
SETTINGS = {"block_length": BLOCK, **net_files(BLOCK)}


@pytest.fixture
def llm(mild: Path) -> Any:
    config = speculation(random_graph(12, 12, 8), 5)
    return shared_engine(mild, SETTINGS, speculative_config=config, max_model_len=1024, max_num_batched_tokens=8192)


@dataclasses.dataclass(frozen=True)
class TorchCase(Case):
    """A request with a policy in torch code."""

    own: Own = dataclasses.field(default_factory=lambda: Own("local_leap"))

    def sampling_params(self, **changes: Any) -> Any:
        taken = {"threshold": self.own.threshold, "steps": self.own.steps * self.num_blocks}
        options = {name: taken[name] for name in rule_of(self.own.policy).takes}
        options |= {f"{self.own.policy}_{name}": value for name, value in self.own.values}
        extra = {"dllm_policy": self.own.policy, **{f"dllm_{name}": value for name, value in options.items()}}
        return super().sampling_params(**{"extra_args": extra, "seed": self.own.seed, **changes})

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
    return [
        TorchCase(
            prompt=tuple(rng.randrange(4, 100) for _ in range(rng.choice([3, 8, 21]))),
            max_tokens=rng.choice([13, 16, 24]),
            own=dataclasses.replace(drawn(policy, rng), steps=rng.choice([2, 4, 8])),
        )
        for policy in BUILT_IN
    ]


def test_all_in_one_batch_beside_native_ones(llm: Any, mild_oracle: Oracle) -> None:
    own, native = cases(1), mixed_cases(BLOCK, seed=7)[:4]
    outputs = run_outputs(llm, [*own, *native])
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    assert tokens[len(own) :] == [mild_oracle.tokens(case, SETTINGS) for case in native]
    accepted = 0
    for case, found, output in zip(own, tokens, outputs, strict=False):
        took = output.kv_transfer_params["dllm"]
        (expected, whole), steps = case.expected(mild_oracle), took["nfe"] + took["accepted"]
        assert (case.own, found) == (case.own, expected)
        # An answer may end within its last block, where no token changes; the plain statement decides all of it.
        may_end = case.max_tokens % BLOCK > 0 and not changes_tokens(case.own.policy)
        assert steps <= whole if may_end else steps == whole, case.own
        accepted += took["accepted"]
    assert accepted > 0


def test_a_preempted_one_ends_in_the_same_tokens(llm: Any, mild_oracle: Oracle) -> None:
    own = cases(2)

    def preempt(number: int, llm: Any) -> None:
        if number in (4, 9):
            assert llm.llm_engine.reset_prefix_cache(reset_running_requests=True)

    assert step_all(llm, own, preempt) == {str(i): case.expected(mild_oracle)[0] for i, case in enumerate(own)}
