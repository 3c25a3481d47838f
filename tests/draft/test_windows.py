"""Drafts of windows that slide: the chain of `reference.wedlm_spiffy`, made of what a step left."""

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from vllm_dllm.draft.windows import WindowDrafter, draft_fronts, with_order
from vllm_dllm.reference.edits import Known
from vllm_dllm.reference.sampling import Sampling
from vllm_dllm.reference.wedlm import Masked, WindowRule
from vllm_dllm.reference.wedlm_spiffy import _Decoder
from vllm_dllm.state.canvas import Blocks, CanvasState
from vllm_dllm.state.request_params import RequestParams
from vllm_dllm.unmask.stats import Candidates

W, MASK, VOCAB, SLOT, PROMPT_LEN = 6, 0, 8, 1, 4


def make(start: int, seq_len: int, sampling: Sampling) -> tuple[WindowDrafter, CanvasState, Blocks]:
    state = CanvasState(2, W, MASK, torch.device("cpu"))
    drafter = WindowDrafter(W - 1)
    drafter.attach(state)
    rule = {"entropy_bound": 0.4, "credit_alpha": 0.0, "credit_beta": 0.0, "credit_gamma": 0.0, "alg_temp": 0.0}
    params = RequestParams(
        policy_id=0,
        threshold=0.9,
        factor=1.0,
        counts=(0,) * W,
        times=(0.0,) * W,
        prompt_len=PROMPT_LEN,
        seq_len=seq_len,
        horizon=2**40,
        top_k=sampling.top_k or 0,
        seed=sampling.seed,
        temperature=sampling.temperature,
        top_p=1.0,
        **rule,
    )
    state.add_request(SLOT, params)
    state.apply_staged_writes()
    return drafter, state, Blocks(torch.tensor([SLOT]), np.array([SLOT]), torch.tensor([start]))


@dataclass(frozen=True, slots=True)
class Decided:
    """A window behind a step, as the reference has it."""

    root: Known
    before: Masked  # what the step found
    rule: WindowRule
    sampling: Sampling

    @classmethod
    def drawn(cls, rng: np.random.Generator, temperature: float, seq_len: int) -> "Decided":
        sampling = Sampling(temperature=temperature, seed=int(rng.integers(2**40)), forbidden_ids=(MASK,))
        end = min(PROMPT_LEN + W, seq_len)
        logits = torch.from_numpy(rng.normal(size=(end - PROMPT_LEN, VOCAB)) * 2).float()
        tokens, is_masked = torch.full((seq_len,), 7), torch.arange(seq_len) >= PROMPT_LEN
        is_masked[PROMPT_LEN + 1 : end] = torch.from_numpy(rng.random(end - PROMPT_LEN - 1) < 0.7)
        before = Masked.of(Known(tokens, is_masked, PROMPT_LEN), logits, PROMPT_LEN, sampling)
        after = is_masked.clone()
        after[before.positions[torch.from_numpy(rng.random(len(before.positions)) < 0.4)]] = False
        return cls(Known(tokens, after, PROMPT_LEN), before, WindowRule(position_penalty=0.1), sampling)

    def observe(self, drafter: WindowDrafter, slots: torch.Tensor, begin: int) -> None:
        """Tell a drafter what the step found; the next window begins at `begin`."""
        penalised = torch.full((1, W), torch.inf).double()
        ids, log_probs = torch.zeros(1, W, VOCAB).long(), torch.full((1, W, VOCAB), -torch.inf).double()
        for place, position in enumerate(self.before.positions.tolist()):
            if self.root.is_masked[position]:
                its = self.rule.penalised(self.before.logits, self.before.positions)[place]
                penalised[0, position - PROMPT_LEN] = its
            top = self.before.logits[place].double().log_softmax(-1).sort(descending=True, stable=True)
            ids[0, position - PROMPT_LEN], log_probs[0, position - PROMPT_LEN] = top.indices, top.values
        drafter.observe(slots, penalised, Candidates(ids, log_probs), torch.tensor([begin - PROMPT_LEN]))


@given(
    seed=st.integers(0, 2**32),
    temperature=st.sampled_from([0.0, 1.5]),
    seq_len=st.integers(PROMPT_LEN + 1, PROMPT_LEN + 2 * W),
)
@example(seed=305, temperature=0.0, seq_len=11)
def test_the_chain_is_the_references(seed: int, temperature: float, seq_len: int) -> None:
    """Of windows in any state, at any place in the row, greedy and sampled; and the host knows its rows."""
    decided = Decided.drawn(np.random.default_rng(seed), temperature, seq_len)
    root = decided.root
    decoder = _Decoder(None, decided.rule, decided.sampling, W, seq_len, ())  # type: ignore[arg-type]
    begin = decoder.start(root)
    if begin == seq_len:
        return
    expected = [d for d in decoder.drafts(root, decided.before, W - 1) if decoder.start(d) < seq_len]
    drafter, state, blocks = make(begin, seq_len, decided.sampling)
    window = torch.full((W,), MASK)
    window[: min(W, seq_len - begin)] = torch.where(root.is_masked, MASK, root.tokens)[begin : begin + W]
    window[seq_len - begin :] = 1  # as of a block that is cut
    state.canvas[SLOT] = window
    decided.observe(drafter, blocks.slots, begin)
    nodes = drafter.propose(blocks, W - 1, looks_ahead=False)
    room = min(2 * W, seq_len - begin)
    found = nodes.canvas[0, 1:, :room][nodes.is_valid[0, 1:]].tolist()
    assert found == [torch.where(d.is_masked, MASK, d.tokens)[begin : begin + room].tolist() for d in expected]
    shown = with_order(state.canvas[blocks.slots], drafter.turns(blocks.slots), MASK)[0].tolist()
    fronts = draft_fronts(shown, seq_len - begin)[: W - 1]  # a window in which nothing was unmasked has one more
    assert fronts == [decoder.start(d) - begin for d in expected]
    drafter._kept.forget(blocks.slots, torch.tensor([True]))
    assert not drafter.propose(blocks, 2, looks_ahead=False).is_valid[0, 1:].any(), "preempted: nothing is known"


def test_the_host_reads_turns_off_a_reported_window() -> None:
    shown = with_order(torch.tensor([[MASK, 9, MASK, MASK]]), torch.tensor([[2, 0, 1, 0]]), MASK)[0].tolist()
    assert shown == [-3, 9, -2, -1]
    assert draft_fronts(shown, 8) == [0, 3], "the second draft knows the third position, too"
    assert draft_fronts(shown, 3) == [0], "a draft that knows all up to the end means nothing"
    assert draft_fronts([-1, 9, -1, -1], 8) == []


def test_expectations_fall_with_the_depth() -> None:
    prior = WindowDrafter(3).prior()
    assert len(prior) == 4
    assert prior[0] == 0.0
    gains = np.diff(prior)
    assert (gains[1:] < gains[:-1]).all()
