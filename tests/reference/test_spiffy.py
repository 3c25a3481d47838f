"""Spiffy against the decoders it abbreviates, for the rules of each family."""

import pytest
import torch

from vllm_dllm.draft.graph import DraftGraph
from vllm_dllm.reference import block_causal, decode, spiffy
from vllm_dllm.reference.decode import KvPolicy
from vllm_dllm.reference.policy import DREAM, SDAR, Rules, UnmaskPolicy
from vllm_dllm.reference.sampling import Sampling

MASK = 3
PROMPT = torch.tensor([7, 11, 5, 19, 30, 4, 8])
GRAPH = DraftGraph((((0, 0),), ((1, 0),), ((0, 1),), ((0, 0), (1, 0)), ((0, 0), (1, 0), (2, 0))))
POLICIES = {
    "static": {"name": "static"},
    "static-2": {"name": "static", "steps": 2},
    "random": {"name": "random"},
    "threshold": {"name": "threshold", "threshold": 0.3},
    "factor": {"name": "factor"},
    "margin": {"name": "margin"},
    "entropy": {"name": "entropy", "alg_temp": 0.2},
    "origin": {"name": "origin"},
    "sequential": {"name": "sequential"},
    "dynamic": {"name": "dynamic", "threshold": 0.5},
    "entropy_bounded": {"name": "entropy_bounded", "entropy_bound": 1.0},
}
SAMPLINGS = {
    "greedy": Sampling(forbidden_ids=(MASK,)),
    "sampled": Sampling(temperature=0.5, top_p=0.9, seed=3, forbidden_ids=(MASK,)),
}


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("family", ["dream", "shift alone", "sdar"])
def test_drafts_change_forwards_and_no_token(dream, sdar, family, name, sampling):
    rules = {"dream": DREAM, "shift alone": Rules(logit_shift=True), "sdar": SDAR}[family]
    lengths = {"gen_length": 12, "block_length": 6}
    values = dict(POLICIES[name], confidence_dtype=torch.float64)
    if "steps" in values and family != "sdar":
        values["steps"] *= 2  # of the whole region
    options = {"policy": UnmaskPolicy(**values), "sampling": sampling, **lengths}
    model = sdar if family == "sdar" else dream
    for layer in model.model.layers:  # the less a position sees of the others, the more drafts come true
        layer.self_attn.o_proj.weight.data *= 0.1
    if family == "sdar":
        plain = block_causal.generate(sdar, PROMPT, **options)
    else:
        plain = decode.generate(dream, PROMPT, kv=KvPolicy("dual"), rules=rules, **options)
    accepted = {}
    for budget in (0, 2, len(GRAPH)):
        found = spiffy.generate(model, PROMPT, graph=GRAPH, budget=budget, rules=rules, **options)
        assert torch.equal(found.tokens, plain.tokens)
        assert found.nfe + found.num_accepted == plain.nfe
        assert found.nfe_refresh == plain.nfe_refresh
        accepted[budget] = found.num_accepted
    assert accepted[0] == 0
    if name in {"static", "margin"} and sampling.temperature == 0:
        assert accepted[len(GRAPH)] > 0


def test_a_stored_blocks_first_call_has_no_drafts(sdar):
    """Blocks of two: the first call draws one position, the second the other, and a finished canvas is no draft."""
    policy, sampling = UnmaskPolicy("sequential"), SAMPLINGS["greedy"]
    options = {"policy": policy, "sampling": sampling, "gen_length": 6, "block_length": 2, "rules": SDAR}
    found = spiffy.generate(sdar, PROMPT[:6], graph=GRAPH, budget=4, **options)
    assert (found.nfe, found.nfe_refresh, found.num_proposed) == (6, 0, 0)
    found = spiffy.generate(sdar, PROMPT[:6], graph=GRAPH, budget=5, **options)
    assert (found.nfe + found.num_accepted, found.num_proposed) == (6, 2), "two of three blocks have one behind them"
