"""What a request asked for, as it is kept by slot (`state.canvas`)."""

from dataclasses import dataclass

from vllm_dllm.state.edits import NO_EDITS, LogitEdits
from vllm_dllm.state.ends import NEVER, NO_ENDS, Ends
from vllm_dllm.state.pins import Pins
from vllm_dllm.state.records import NO_LOGPROBS


@dataclass(frozen=True, slots=True)
class RequestParams:
    """What a request asked for, resolved: no value is missing."""

    policy_id: int
    threshold: float
    factor: float
    entropy_bound: float
    credit_alpha: float
    credit_beta: float
    credit_gamma: float
    alg_temp: float  # 0 draws no positions
    counts: tuple[int, ...]  # schedule.count_table
    times: tuple[float, ...]  # schedule.reveal_times
    prompt_len: int
    seq_len: int  # prompt and generation, in positions
    temperature: float
    top_k: int  # 0 keeps all
    top_p: float
    seed: int  # any 64-bit signed value
    position_penalty: float = 0.0  # of a window, nats
    horizon: int = NEVER  # positions that the sequence has from the block under way on, at most
    edits: LogitEdits = NO_EDITS
    ends: Ends = NO_ENDS
    cfg_scale: float = 0.0  # 0 does not guide
    num_logprobs: int = NO_LOGPROBS  # likeliest tokens of each place that are told
    own_policy: str | None = None  # one without a native twin, in place of that of `policy_id`
    own_values: tuple[float, ...] = ()  # its parameters, in their order
    request_id: str = ""  # nobody else's, and the same after a preemption
    pins: Pins | None = None
    targets: tuple[int, ...] | None = None  # what its block is scored by; None: it is decoded
