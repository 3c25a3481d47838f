"""Prophet (arXiv:2508.19982): once the answer is certain, everything is unmasked."""

import torch

from vllm_dllm.unmask.memory import PolicyState
from vllm_dllm.unmask.parameter import Parameter
from vllm_dllm.unmask.torch_policy import Decision, Seen, TorchPolicy

EARLY, LATE = 0.33, 0.67
"""Shares of the steps before which the gap has to be large, or middling."""

_MAX_LENGTH = 2**31  # of any reply


def _decide(seen: Seen, _state: PolicyState) -> Decision:
    """Unmask as `static`, or all, where the likeliest token leads the second by enough on the average of the answer."""
    values, top = seen.values, seen.rows.top_logits.double()
    gap = (top[:, 0] - top[:, 1]).view_as(seen.canvas)
    assert seen.params.own is not None, "these canvases have such a policy"
    offset = seen.params.position - (seen.params.own.prompt_len + values["begin"].long())[:, None]
    length = torch.where(values["length"] > 0, values["length"].long(), _MAX_LENGTH)
    is_answer = (offset >= 0) & (offset < length[:, None])
    mean = torch.where(is_answer, gap, 0.0).sum(1) / is_answer.sum(1).clamp(min=1)
    progress = seen.step.double() / seen.num_steps.double()
    needed = torch.where(progress < LATE, values["gap_middle"], values["gap_late"])
    needed = torch.where(progress < EARLY, values["gap_early"], needed)
    is_certain = is_answer.any(1) & (mean >= needed)
    usual = seen.highest(seen.confidence, seen.scheduled)
    return Decision(seen.unmask(torch.where(is_certain[:, None], seen.is_open, usual)))


def _gap(default: float, when: str) -> Parameter:
    return Parameter(default, f"what the mean gap of logits has to reach in the {when} of the steps", high=100.0)


PROPHET = TorchPolicy(
    _decide,
    source="Prophet, arXiv:2508.19982",
    takes=("steps",),
    parameters={
        "gap_early": _gap(7.5, "first third"),
        "gap_middle": _gap(5.0, "second third"),
        "gap_late": _gap(2.5, "last third"),
        "begin": Parameter(0, "where the answer begins in the reply", high=_MAX_LENGTH, is_whole=True),
        "length": Parameter(0, "positions of the answer; 0: all behind", high=_MAX_LENGTH, is_whole=True),
    },
)
