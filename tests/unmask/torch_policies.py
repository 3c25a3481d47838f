"""Blocks decoded by policies in torch code, beside native ones, with and without drafts; and by their references."""

import functools
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.draft.test_exact import CPU, EOS, MASK, SyntheticModel, drafter_of
from vllm_dllm.denoiser import Denoiser
from vllm_dllm.draft.graph import DraftGraph
from vllm_dllm.policy_options import own_values
from vllm_dllm.reference.coherent_rule import Ccd
from vllm_dllm.reference.decode import KvPolicy
from vllm_dllm.reference.dit_rule import DitConfidence, Taken
from vllm_dllm.reference.editing_rule import Editing
from vllm_dllm.reference.end_of_text_rule import Eotp, Learn2PdEotp, Reply
from vllm_dllm.reference.indel_rule import Indel
from vllm_dllm.reference.remasking_rules import Rcr, Remdm, Saber
from vllm_dllm.reference.rules import Rule, generate
from vllm_dllm.reference.threshold_rules import Ass, EntropyThreshold, Eoser, EosLast, Hierarchy, LocalLeap
from vllm_dllm.reference.window_rules import AdaBlock, Deferred, Learn2Pd, Prophet
from vllm_dllm.state.canvas import Blocks, CanvasState
from vllm_dllm.state.draws import native_draws
from vllm_dllm.state.edits import NO_EDITS, LogitEdits
from vllm_dllm.state.report import Column
from vllm_dllm.state.request_params import RequestParams
from vllm_dllm.state.settle import Ledger, native_settle
from vllm_dllm.unmask.head import LogitsHead
from vllm_dllm.unmask.policies.dit_confidence import shapes
from vllm_dllm.unmask.policy import POLICY_IDS
from vllm_dllm.unmask.registry import torch_policy
from vllm_dllm.unmask.schedule import UnmaskRules, count_table, reveal_times
from vllm_dllm.unmask.walk import native_walk

EOT = 5
NET_NAMES = ("weight1", "bias1", "weight2", "bias2")
_FOLDER = tempfile.TemporaryDirectory()


def net(block_length: int) -> dict[str, torch.Tensor]:
    """A net for `learn2pd`, which takes a part of the positions for final."""
    generator = torch.Generator().manual_seed(block_length)
    sizes = ((block_length, block_length), (block_length,)) * 2
    names = ("linear1.weight", "linear1.bias", "linear2.weight", "linear2.bias")
    return {name: 3 * torch.randn(size, generator=generator) for name, size in zip(names, sizes, strict=True)}


@functools.cache
def unmasking_net() -> dict[str, torch.Tensor]:
    """A net for `dit_confidence`, whose outputs differ by all that it sees."""
    generator = torch.Generator().manual_seed(0)
    made = {name: torch.randn(size, generator=generator) / size[-1] ** 0.5 for name, size in shapes().items()}
    made["base_policy.transformer_blocks.0.inv_freq"] = 1e4 ** -(torch.arange(0, 64, 2) / 64)
    for name in made:
        if "norm" in name and name.endswith("weight"):
            made[name] += 1.0
    for name, times in {"confidence_proj.bias": 8, "time_mlp.2.weight": 8, "output_proj.weight": 3}.items():
        made[f"base_policy.{name}"] *= times
    return made


@functools.cache
def net_files(block_length: int) -> dict[str, str]:
    """A server's settings with the files of all nets."""
    nets = {"learn2pd_file": net(block_length), "dit_confidence_file": unmasking_net()}
    paths = {option: Path(_FOLDER.name) / f"{option}-{block_length}.safetensors" for option in nets}
    for option, path in paths.items():
        save_file(nets[option], path)
    return {option: str(path) for option, path in paths.items()}


@dataclass(frozen=True)
class Own:
    """A request with a policy in torch code, or a native one."""

    policy: str
    values: tuple[tuple[str, float], ...] = ()  # its parameters by name, without the policy's
    threshold: float = 0.9
    steps: int = 8
    seed: int = 0
    tail: tuple[int, ...] = ()  # of the prompt, known from the start
    edits: LogitEdits = NO_EDITS
    temperature: float = 0.0

    def params(self, rules: UnmaskRules, block_length: int, seq_len: int) -> RequestParams:
        is_native = self.policy in POLICY_IDS
        values = {f"{self.policy}_{name}": value for name, value in self.values}
        return RequestParams(
            policy_id=POLICY_IDS.get(self.policy, 0),
            own_policy=None if is_native else self.policy,
            request_id=str(self),
            own_values=() if is_native else own_values(self.policy, values),
            threshold=self.threshold,
            factor=1.0,
            entropy_bound=0.35,
            credit_alpha=0.7,
            credit_beta=0.8,
            credit_gamma=0.2,
            alg_temp=0.0,
            counts=count_table(rules, block_length, min(self.steps, block_length)),
            times=reveal_times(block_length, min(self.steps, block_length)),
            prompt_len=len(self.tail),
            seq_len=seq_len,
            temperature=self.temperature,
            top_k=0,
            top_p=1.0,
            seed=self.seed,
            edits=self.edits,
        )


@dataclass
class Done:
    """What became of a request."""

    tokens: list[int]
    steps: int = 0  # transitions
    forwards: int = 0
    accepted: int = 0
    failed: bool = False


def decode(
    model: SyntheticModel,
    requests: Sequence[Own],
    drafts: DraftGraph | None = None,
    budget: int = 0,
    *,
    num_blocks: int = 1,
    is_native: bool = True,
    rules: UnmaskRules = UnmaskRules(eos_id=EOS, eot_id=EOT),  # noqa: B008 - a frozen value
    void_first: bool = False,
) -> list[Done]:
    """Decode some blocks of all requests together, from the second step on with drafts.

    With `void_first` each step is taken twice, void at first.
    """
    length, vocab_size = model.block_length, model.config.vocab_size
    state = CanvasState(len(requests), length, MASK, CPU, rules, vocab_size=vocab_size, files=net_files(length))
    for slot, request in enumerate(requests):
        state.add_request(slot, request.params(rules, length, num_blocks * length))
    state.apply_staged_writes()
    head = LogitsHead(lambda hidden: hidden.clone(), vocab_size, MASK, is_native=is_native)
    drafter = drafter_of(drafts, is_native=is_native)
    denoiser = Denoiser(state, drafter, head, *((native_walk, native_settle, native_draws) if is_native else ()))
    done = [Done([]) for _ in requests]
    slots, start = torch.arange(len(requests)), torch.zeros(len(requests), dtype=torch.int64)
    denoiser.begin_blocks(slots, torch.ones(len(requests), dtype=torch.bool))
    for slot, request in enumerate(requests):
        state.canvas[slot, : len(request.tail)] = torch.tensor(request.tail, dtype=torch.int64)
    for number in range(100 * num_blocks * length):
        blocks = Blocks(slots, slots.numpy(), start[slots])
        nodes = denoiser.nodes(blocks, budget if number else 0)
        hidden = model.block_logits(nodes.canvas.flatten(0, 1)).flatten(0, 1)
        known = blocks.start
        if void_first:
            void = denoiser.void(blocks, denoiser.advance(blocks, nodes, hidden), torch.ones_like(known).bool())
            denoiser.settle(blocks, nodes, void, Ledger(len(slots), known, torch.full_like(known, length)))
            nodes = denoiser.nodes(blocks, 0)
            hidden = model.block_logits(nodes.canvas.flatten(0, 1)).flatten(0, 1)
        made = denoiser.advance(blocks, nodes, hidden)
        emission = denoiser.settle(blocks, nodes, made, Ledger(len(slots), known, torch.full_like(known, length)))
        for place, slot in enumerate(slots.tolist()):
            own, taken = done[slot], made.path[place][made.path[place] >= 0].tolist()
            assert len(taken) == len(set(taken)), "each draft comes true once"
            own.failed = bool(emission.report[place, Column.FAULTS])
            own.steps += int(made.num_steps[place])
            own.forwards += int(emission.report[place, Column.FORWARDS])
            own.accepted += int(made.num_accepted[place])
            if emission.num_sampled[place]:
                own.tokens += emission.sampled[place].tolist()
                start[slot] += length
        going = [not done[s].failed and len(done[s].tokens) < num_blocks * length for s in slots.tolist()]
        slots = slots[torch.tensor(going)]
        if not len(slots):
            return done
    raise AssertionError("a block does not end")


@dataclass(frozen=True)
class PlainRule:
    """How a policy's plain statement is made."""

    make: Callable[..., Rule]
    takes: tuple[str, ...]  # options that it shares with other policies

    def of(
        self, request: Own, block_length: int, num_blocks: int, end_ids: tuple[int, ...], prompt_len: int = 0
    ) -> Callable[[], Rule]:
        """Return what makes the rule of a request's next block."""
        own: dict[str, Any] = {"threshold": request.threshold, "steps": min(request.steps, block_length)}
        its = dict(request.values)
        if request.policy == "editing":  # whose parameter has the name of the option
            its["editing_threshold"] = its.pop("threshold", 0.9)
        own = {name: own[name] for name in self.takes} | its
        if request.policy in {"eoser", "eoser_ass", "eotp", "learn2pd_eotp"}:
            own["eos_id"] = end_ids[0]
        if request.policy in {"eotp", "learn2pd_eotp"}:
            own["reply"] = Reply()
        if request.policy == "eoser":
            own["num_blocks"] = num_blocks
        if request.policy in {"adablock", "dit_confidence"}:
            own["gen_length"] = num_blocks * block_length
        if request.policy == "dit_confidence":
            own |= {"net": unmasking_net(), "taken": Taken(prompt_len), "seed": request.seed}
        if request.policy in {"learn2pd", "learn2pd_eotp"}:
            own |= {
                name: its.double().tolist() for name, its in zip(NET_NAMES, net(block_length).values(), strict=True)
            }
        if request.policy == "confidence_eos_eot_inf":
            own["end_ids"] = end_ids
        return partial(self.make, **own)


RULES: dict[str, Callable[..., Rule]] = {
    "local_leap": LocalLeap,
    "entropy_threshold": EntropyThreshold,
    "hierarchy": Hierarchy,
    "eoser": Eoser,
    "ass": Ass,
    "eoser_ass": Ass,
    "confidence_eos_eot_inf": EosLast,
    "learn2pd": Learn2Pd,
    "eotp": Eotp,
    "learn2pd_eotp": Learn2PdEotp,
    "dit_confidence": DitConfidence,
    "saber": Saber,
    "rcr": Rcr,
    "remdm": Remdm,
    "ccd": Ccd,
    "prophet": Prophet,
    "adablock": AdaBlock,
    "deferred": Deferred,
    "editing": Editing,
    "indel": Indel,
}
"""Policies -> their plain statements."""


def rule_of(policy: str) -> PlainRule:
    return PlainRule(RULES[policy], torch_policy(policy).takes)


def plain(model: Any, request: Own, num_blocks: int = 1) -> tuple[list[int], int]:
    """Decode a request by its plain statement; returns its tokens, and the steps it took."""
    length = model.block_length
    made = generate(
        model,
        torch.zeros(0, dtype=torch.int64),
        gen_length=num_blocks * length,
        block_length=length,
        rule=rule_of(request.policy).of(request, length, num_blocks, (EOS, EOT)),
        kv=KvPolicy("dual"),
    )
    return made.tokens, made.nfe


def drawn(policy: str, rng: random.Random) -> Own:
    """Draw a request with a policy."""
    draw: dict[str, dict[str, Any]] = {
        "local_leap": {"relaxed": rng.choice([0.1, 0.5, 0.75]), "radius": rng.randrange(5)},
        "entropy_threshold": {"bound": rng.choice([0.1, 0.5, 1.5])},
        "hierarchy": {"low": rng.choice([0.1, 0.3, 0.6])},
        "eoser": {"gamma_min": rng.choice([0.01, 0.4])},
        "ass": {},
        "eoser_ass": {"gamma_max": rng.choice([0.3, 1.0])},
        "confidence_eos_eot_inf": {},
        "learn2pd": {"accept": rng.choice([0.5, 0.96])},
        "eotp": {},
        "learn2pd_eotp": {"accept": rng.choice([0.5, 0.96])},
        "dit_confidence": {"temperature": rng.choice([0.1, 0.5, 1.0, 4.0])},
        "saber": {"least": rng.choice([1, 2, 3, 5])},
        "rcr": {},
        "prophet": {"gap_early": rng.choice([1.0, 3.0, 7.5]), "gap_middle": rng.choice([0.5, 2.0, 5.0])},
        "adablock": {
            "delimiter": rng.choice([2, 4, 6, 8]),
            "sure": rng.choice([0.01, 0.3]),
            "length": rng.choice([1, 3, 5, 32]),
            "ahead": rng.choice([0.25, 0.5]),
        },
        "deferred": {"width": rng.choice([1, 2, 5]), "most": rng.choice([1, 4, 9])},
        "editing": {
            "threshold": rng.choice([0.0, 0.3, 0.6, 0.9]),
            "post_steps": rng.choice([0, 1, 2, 16]),
            "least": rng.choice([1, 1, 2]),
        },
        "indel": {
            "edit_threshold": rng.choice([0.0, 0.0, 0.3, 0.7]),
            "post_steps": rng.choice([0, 1, 2, 16]),
            "delete": 8,
            "split": 9,
        },
        "ccd": {"ratio": rng.choice([0.5, 2.0, 4.0])},
        "remdm": {"loops": rng.choice([0, 1, 4]), "number": rng.choice([1, 2, 3])},
    }
    return Own(
        policy,
        tuple(draw[policy].items()),
        threshold=rng.choice([0.4, 0.8, 0.97]),
        steps=rng.choice([1, 2, 4, 8, 16, 16]),
        seed=rng.randrange(99),
    )
