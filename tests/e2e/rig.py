"""Requests, random models, the reference decoder on them, and what tests do with an engine."""

import dataclasses
import json
import math
import random
from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from tests.e2e.engines import MAX_MODEL_LEN, NUM_SLOTS
from tests.e2e.engines import engine as engine
from tests.e2e.engines import shared_engine as shared_engine
from tests.e2e.engines import stop_shared_engine as stop_shared_engine
from tests.e2e.kv import kv_policy
from tests.e2e.questions import CHECKPOINT as CHECKPOINT
from tests.e2e.questions import EXAMPLES as EXAMPLES
from tests.e2e.questions import questions as questions
from vllm_dllm.blocks import row_blocks
from vllm_dllm.config import DllmConfig
from vllm_dllm.draft.graph import DraftGraph, Formula
from vllm_dllm.draft.graph_file import GraphFile, dump_graph, parse_graph
from vllm_dllm.draft.readiness import Readiness
from vllm_dllm.names import PolicyName
from vllm_dllm.policy_options import POLICY_OPTIONS
from vllm_dllm.reference import spiffy
from vllm_dllm.reference.decode import Model, generate
from vllm_dllm.reference.edits import Edits
from vllm_dllm.reference.ends import NO_ENDS, Ends
from vllm_dllm.reference.model import LLaDA
from vllm_dllm.reference.policy import LLADA, Rules, UnmaskPolicy
from vllm_dllm.reference.sampling import Sampling
from vllm_dllm.state.edits import NO_EDITS, LogitEdits


@dataclasses.dataclass(frozen=True)
class Case:
    """One request and all that decides its tokens."""

    prompt: tuple[int, ...]
    max_tokens: int
    policy: PolicyName = "static"
    threshold: float = 0.9
    factor: float = 1.0
    entropy_bound: float = 0.35
    credit_alpha: float = 0.7
    credit_beta: float = 0.8
    credit_gamma: float = 0.2
    alg_temp: float | None = None
    steps: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    edits: LogitEdits = NO_EDITS
    cfg_scale: float | None = None
    given: tuple[int | None, ...] = ()  # of the answer; what is behind `max_tokens` is a suffix
    stop_ids: tuple[int, ...] = ()
    horizon: int | None = None

    @property
    def ends(self) -> Ends:
        return Ends(self.stop_ids, self.edits.min_tokens, self.max_tokens)

    def sampling_params(self, **changes: Any) -> Any:
        from vllm import SamplingParams

        names = ("policy", "cfg_scale", "horizon", *POLICY_OPTIONS[self.policy])
        options = {name: getattr(self, name) for name in names}
        extra: dict[str, Any] = {f"dllm_{name}": value for name, value in options.items() if value is not None}
        if self.given:
            suffix = list(self.given[self.max_tokens :])
            extra |= {"dllm_suffix": suffix} if suffix else {"dllm_canvas": list(self.given)}
        values = {
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "seed": self.seed,
            "ignore_eos": True,
            "stop_token_ids": list(self.stop_ids),
            "extra_args": extra,
            "min_p": self.edits.min_p,
            "min_tokens": self.edits.min_tokens,
            "allowed_token_ids": list(self.edits.allowed_ids) or None,
            "logit_bias": dict(self.edits.bias) or None,
            **{f"{name}_penalty": getattr(self.edits, name) for name in ("repetition", "frequency", "presence")},
        }
        params = SamplingParams(**(values | changes))
        if self.edits.bad_words:
            params._bad_words_token_ids = [list(word) for word in self.edits.bad_words]
        return params


class Oracle:
    """The reference decoder on a checkpoint. It decodes a case once, however many tests compare with it.

    Args:
        checkpoint: its folder.
        model: the reference model, by default LLaDA's.
        rules: the family's.
        max_model_len: of the engine that it is compared with.
    """

    def __init__(
        self,
        checkpoint: Path,
        model: Model | None = None,
        rules: Rules = LLADA,
        max_model_len: int = MAX_MODEL_LEN,
    ) -> None:
        self.checkpoint = checkpoint
        self.model = model or LLaDA.from_pretrained(checkpoint, torch.float32)
        self.rules = rules
        self.max_model_len = max_model_len
        self._decoded: dict[Hashable, Any] = {}

    def _once(self, decode: Callable[..., Any], case: Case, settings: dict[str, Any], *more: Hashable) -> Any:
        key = (decode.__name__, case, tuple(sorted(settings.items())), *more)
        if key not in self._decoded:
            self._decoded[key] = decode(case, settings, *more)
        return self._decoded[key]

    def generation(self, case: Case, settings: dict[str, Any]) -> Any:
        """Decode without drafts."""
        return self._once(self._generate, case, settings)

    def published(self, case: Case, settings: dict[str, Any]) -> Any:
        return self.generation(dataclasses.replace(case, stop_ids=()), settings | {"goes_on": True})

    def speculative(self, case: Case, settings: dict[str, Any], graph: DraftGraph, budget: int) -> Any:
        """Decode with drafts, which a KV policy that freezes what a block sees allows."""
        return self._once(self._speculate, case, settings, graph, budget)

    def _generate(self, case: Case, settings: dict[str, Any], **more: Any) -> Any:
        """Decode anew; `more` are arguments of the reference's."""
        kv = kv_policy(settings)
        options = self._options(case, settings) | {"given": case.given, "answer_length": case.max_tokens} | more
        return generate(self.model, torch.tensor(case.prompt), kv=kv, **options)

    def _options(self, case: Case, settings: dict[str, Any]) -> dict[str, Any]:
        block_length = settings.get("block_length", 32)
        length = max(case.max_tokens, len(case.given))
        blocks = row_blocks(len(case.prompt), length, DllmConfig(block_length=block_length), self.max_model_len)
        return {
            "gen_length": blocks.end - blocks.begin,
            "block_length": block_length,
            "rules": self.rules,
            **({} if case.horizon is None else {"horizon": case.horizon}),
            "ends": NO_ENDS if settings.get("goes_on") else case.ends,
            "policy": UnmaskPolicy(
                case.policy,
                steps=case.steps,
                threshold=case.threshold,
                factor=case.factor,
                entropy_bound=case.entropy_bound,
                credit_alpha=case.credit_alpha,
                credit_beta=case.credit_beta,
                credit_gamma=case.credit_gamma,
                alg_temp=case.alg_temp,
                confidence_dtype=torch.float64,
            ),
            "sampling": Sampling(
                temperature=case.temperature,
                seed=case.seed,
                cfg_scale=settings.get("cfg_scale", 0.0) if case.cfg_scale is None else case.cfg_scale,
                top_k=case.top_k or None,
                top_p=case.top_p if case.top_p < 1 else None,
                min_p=case.edits.min_p if case.temperature else 0.0,
                forbidden_ids=(self.model.config.mask_token_id,),
                edits=self._edits(case),
            ),
        }

    def _edits(self, case: Case) -> Edits:
        values = dataclasses.asdict(case.edits)
        del values["min_p"]
        return Edits(**values | {"end_ids": self.end_ids})

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """What ends an answer."""
        config = json.loads((self.checkpoint / "config.json").read_text())
        return tuple(sorted({config["eos_token_id"], config.get("eot_token_id")} - {None}))

    def _speculate(self, case: Case, settings: dict[str, Any], graph: DraftGraph, budget: int) -> Any:
        plain = self._options(case, settings)
        kv = kv_policy(settings)
        return spiffy.generate(self.model, torch.tensor(case.prompt), graph=graph, budget=budget, kv=kv, **plain)

    def tokens(self, case: Case, settings: dict[str, Any]) -> list[int]:
        return case.ends.cut(self.generation(case, settings).tokens.tolist())


LLADA_POLICIES: tuple[PolicyName, ...] = ("static", "random", "threshold", "factor")


def mixed_cases(block_length: int, seed: int, policies: Sequence[PolicyName] = LLADA_POLICIES) -> list[Case]:
    """Sixteen requests of odd lengths, greedy and sampled, of all policies; some have `credit` for `threshold`."""
    rng = random.Random(seed)
    cases = []
    for i in range(NUM_SLOTS):
        prompt = tuple(rng.randrange(4, 100) for _ in range(rng.choice([1, 2, 5, 7, 13, 21, 33, 47])))
        max_tokens = rng.choice([1, 3, block_length - 1, block_length, block_length + 1, 37, 61])
        num_blocks = -(-max_tokens // block_length)
        policy = policies[i % len(policies)]
        if policy == "threshold" and 4 <= i < 12:
            policy = "credit"
        steps = rng.choice([None, num_blocks, num_blocks * rng.randrange(1, block_length + 1)])
        if policy == "dynamic" and steps is not None:
            steps = num_blocks * math.gcd(steps // num_blocks, block_length)
        cases.append(
            Case(
                prompt=prompt,
                max_tokens=max_tokens,
                policy=policy,
                threshold=rng.choice([0.05, 0.3, 0.9]),
                factor=rng.choice([0.3, 1.0, 1.9]),
                entropy_bound=rng.choice([0.35, 5.0]) if policy == "entropy_bounded" else 0.35,
                alg_temp=rng.choice([None, 0.3]) if policy in {"margin", "entropy"} else None,
                steps=steps if "steps" in POLICY_OPTIONS[policy] else None,
                temperature=[0.0, 0.7][(i // len(policies)) % 2],
                top_k=rng.choice([0, 0, 5]) * (policy != "credit"),
                top_p=max(rng.choice([1.0, 1.0, 0.8]), float(policy == "credit")),
                seed=rng.randrange(-(2**63), 2**63),
            )
        )
    return cases


def short(cases: list[Case]) -> list[Case]:
    """Return six cases of at most 24 tokens, for engines with slow steps: two ranks on two busy cores."""
    return [dataclasses.replace(case, max_tokens=min(case.max_tokens, 24), steps=None) for case in cases[:6]]


def run_outputs(llm: Any, cases: list[Case], **changes: Any) -> list[Any]:
    prompts = [{"prompt_token_ids": list(case.prompt)} for case in cases]
    return llm.generate(prompts, [case.sampling_params(**changes) for case in cases], use_tqdm=False)


def run(llm: Any, cases: list[Case]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in run_outputs(llm, cases)]


def model_state(llm: Any) -> Any:
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner.model_state


def step_all(llm: Any, cases: list[Case], before_step: Any = None) -> dict[str, list[int]]:
    """Run cases by single steps; `before_step(number, llm)` may interfere. Returns the finished requests' tokens."""
    for i, case in enumerate(cases):
        llm.llm_engine.add_request(str(i), {"prompt_token_ids": list(case.prompt)}, case.sampling_params())
    finished, number = {}, 0
    while llm.llm_engine.has_unfinished_requests():
        if before_step is not None:
            before_step(number, llm)
        number += 1
        for output in llm.llm_engine.step():
            if output.finished:
                finished[output.request_id] = list(output.outputs[0].token_ids)
    return finished


def preempt_at_times(number: int, llm: Any) -> None:
    """Preempt all who run before some steps: not for ever, since a block begins anew."""
    if number in (4, 13, 31):
        assert llm.llm_engine.reset_prefix_cache(reset_running_requests=True)


def random_graph(seed: int, num_nodes: int, block_length: int, tokens_per_step: int | None = None) -> DraftGraph:
    """Nodes that hang together, with numbers as calibration gives them."""
    rng, step = random.Random(seed), tokens_per_step or 1
    formulas: list[Formula] = [tuple((rank, 0) for rank in range(size * step)) for size in range(4)]
    while len(formulas) <= num_nodes:
        parent = rng.choice(formulas)
        taken = {rank for rank, _ in parent}
        free = [rank for rank in range(min(block_length, len(parent) + step + 2)) if rank not in taken]
        if len(free) < step:
            continue
        added = [(rank, rng.choice([0, 0, 0, 1])) for rank in rng.sample(free, step)]
        child = tuple(sorted([*parent, *added]))
        if child not in formulas:
            formulas.append(child)
    counts = tuple(rng.randrange(1, 100) for _ in range(num_nodes))
    expected = tuple(rng.uniform(1, 100) for _ in range(num_nodes))
    readiness = Readiness(1.7, (1.2, 0.8), -1.0)
    graph = DraftGraph(tuple(formulas[1:]), tokens_per_step, counts, 100, readiness, expected)
    return parse_graph(json.loads(dump_graph(GraphFile(graph)))).graph  # with parents first


def speculation(graph: DraftGraph, budget: int | str, **changes: Any) -> dict[str, Any]:
    """Return a `speculative_config`."""
    inline = json.loads(dump_graph(GraphFile(graph)))
    return {"method": "spiffy", "draft_graph": inline, "budget": budget, **changes}


def check_counts_while_running(llm: Any, cases: list[Case]) -> None:
    """Compare the runner's and the scheduler's computed tokens at every step: a forgotten rejection lets them drift."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    states = llm.llm_engine.model_executor.driver_worker.worker.model_runner.req_states
    compared = 0

    def compare(_number: int, _llm: Any) -> None:
        nonlocal compared
        for request in scheduler.running:
            slot = states.req_id_to_index.get(request.request_id)
            if slot is not None:
                assert int(states.num_computed_tokens.gpu[slot]) == request.num_computed_tokens
                compared += 1

    step_all(llm, cases, compare)
    assert compared > len(cases)
