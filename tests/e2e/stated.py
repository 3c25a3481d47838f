"""Requests with each policy, some of them at a temperature, and what `tests/statements` makes of them on a LLaDA."""

import dataclasses
import random
from typing import Any

import torch

from tests.e2e.rig import Oracle
from tests.e2e.torch_cases import BLOCK, TorchCase
from tests.statements.decode import RULES, Forward
from tests.statements.requests import request, stated
from vllm_dllm.policy_options import POLICY_OPTIONS
from vllm_dllm.reference.decode import KvPolicy, Predictor
from vllm_dllm.unmask.registry import BUILT_IN


@dataclasses.dataclass(frozen=True)
class StatedCase(TorchCase):
    """A request with any policy of ours."""

    def options(self) -> dict[str, Any]:
        grows = {} if self.horizon is None else {"horizon": self.horizon}
        if self.own.policy in BUILT_IN:
            return super().options() | grows
        taken = {"threshold": self.own.threshold, "steps": self.own.steps * self.num_blocks}
        known = POLICY_OPTIONS[self.own.policy]
        return {name: taken[name] for name in known if name in taken} | dict(self.own.values) | grows

    def expected(self, oracle: Oracle) -> tuple[list[int], int]:
        """Return what the statement generates under the dual cache, and in how many steps."""
        start, end = len(self.prompt), len(self.prompt) + self.num_blocks * BLOCK
        tokens = torch.cat((torch.tensor(self.prompt), torch.full((end - start,), oracle.model.config.mask_token_id)))
        predictor = Predictor(oracle.model, torch.arange(end) < start, cfg_scale=0.0, logit_shift=False)

        def forward_of(number: int, before: list[int]) -> Forward:
            begin, taken = start + number * BLOCK, 0
            tokens[start:begin] = torch.tensor(before)
            seq_len = end if self.horizon is None else min(end, begin + self.horizon * BLOCK)

            def forward(canvas: list[int]) -> list[list[float]]:
                nonlocal taken
                tokens[begin : begin + BLOCK] = torch.tensor(canvas)
                first, last, keeps = KvPolicy("dual").span(number, taken, (begin, begin + BLOCK), seq_len, 0)
                taken += 1
                with torch.no_grad():
                    rows = predictor.logits(tokens[:seq_len], first, last, keeps=keeps)
                return rows[begin - first : begin - first + BLOCK].tolist()

            return forward

        eos = oracle.model.config.eos_token_id
        (end_of_turn,) = {*oracle.end_ids} - {eos}
        made, steps = stated(self.own, BLOCK, self.num_blocks, forward_of, start=start, ends=(eos, end_of_turn))
        return made[: self.max_tokens], steps


def stated_cases(seed: int, horizons: tuple[int | None, ...] = (None,)) -> list[StatedCase]:
    """One request for each policy, in another order of policies for another seed."""
    rng = random.Random(seed)
    made = []
    for i, policy in enumerate(rng.sample(sorted(RULES), len(RULES))):
        own = request(policy, rng)
        own = dataclasses.replace(own, steps=rng.choice([2, 4, 8]) if policy != "dynamic" else own.steps)
        prompt = tuple(rng.randrange(4, 100) for _ in range(rng.choice([3, 8, 21])))
        options = {"seed": own.seed, "temperature": own.temperature, "horizon": horizons[i % len(horizons)]}
        made.append(StatedCase(prompt, rng.choice([13, 16, 24]), own=own, **options))
    return made
