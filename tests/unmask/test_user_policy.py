"""A user's policy: how it is found, what is refused of it, and what becomes of requests at which it fails."""

import functools
import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from importlib.metadata import EntryPoint
from typing import Any

import pytest
import torch

from tests.draft.example_graph import PROVENANCE
from tests.draft.test_exact import CPU, MASK, SDAR, VOCAB, SyntheticModel, drafter_of
from tests.draft.test_exact_cases import CHAIN
from tests.draft.test_look_ahead import ChainModel, Row, step
from tests.draft.test_look_ahead import decode as look_ahead_decode
from tests.unmask.torch_policies import Own, decode
from vllm_dllm.cli.server_settings import given_parameters
from vllm_dllm.config import InvalidOptionError, parse_request_options, parse_server_settings
from vllm_dllm.denoiser import Denoiser
from vllm_dllm.draft.graph_file import GraphFile, dump_graph, parse_graph
from vllm_dllm.draft.provenance import calibrate_command, decoding_settings
from vllm_dllm.errors import ConfigError, GraphError
from vllm_dllm.request_checks import check_policy_options
from vllm_dllm.state.canvas import CanvasState
from vllm_dllm.unmask import registry
from vllm_dllm.unmask.head import LogitsHead
from vllm_dllm.unmask.memory import PolicyState, StateField
from vllm_dllm.unmask.parameter import Parameter
from vllm_dllm.unmask.torch_policy import CHANGING_STEPS, Decision, Seen, TorchPolicy

LENGTH = 8


def grow(seen: Seen, _state: PolicyState) -> Decision:
    """Unmask as many positions as `pace` says."""
    return Decision(seen.unmask(seen.highest(seen.confidence, seen.values["pace"].long())))


def count(seen: Seen, state: PolicyState) -> Decision:
    """Unmask one position more than in the step before, over all blocks of the request."""
    unmasked = seen.unmask(seen.highest(seen.confidence, 1 + state["count"][:, 0, 0]))
    return Decision(unmasked, {"count": state["count"] + 1})


def raise_at(seen: Seen, _state: PolicyState) -> Decision:
    """Raise for canvases of a request, by its seed, in the third step."""
    if ((seen.params.seed == 1) & (seen.step == 2)).any():
        raise ZeroDivisionError("no such luck")
    return Decision(seen.unmask(seen.highest(seen.confidence, torch.ones_like(seen.step))))


def returns(make: Callable[[Seen, PolicyState], object]) -> Callable[[Seen, PolicyState], Any]:
    """Do as `grow` in blocks' first steps, and behind them return something else for seed 1."""

    def decide(seen: Seen, state: PolicyState) -> Any:
        usual = seen.unmask(seen.highest(seen.confidence, torch.ones_like(seen.step)))
        is_its = ((seen.params.seed == 1) & (seen.step > 0))[:, None]
        made = make(seen, state)
        if isinstance(made, torch.Tensor) and made.shape == usual.shape:
            return Decision(torch.where(is_its, made, usual))
        return made if is_its.any() else Decision(usual)

    return decide


FAULTS: dict[str, Callable[[Seen, PolicyState], object]] = {
    "a token of no vocabulary": lambda seen, _: torch.full_like(seen.canvas, VOCAB),
    "a negative token": lambda seen, _: torch.full_like(seen.canvas, -1),
    "another token": lambda seen, _: torch.where(seen.is_open, (seen.token_ids + 1) % VOCAB, seen.canvas),
    "a known token changed": lambda seen, _: torch.where(seen.is_masked, seen.canvas, (seen.canvas + 1) % MASK),
    "a wrong shape": lambda seen, _: Decision(seen.canvas[:, 1:]),
    "a wrong type": lambda seen, _: Decision(seen.canvas.double()),
    "no tensor": lambda seen, _: Decision(seen.canvas.tolist()),  # type: ignore[arg-type]
    "no decision": lambda seen, _: None,
    "an unknown field": lambda seen, _: Decision(seen.canvas, {"more": seen.canvas}),
    "a field of another shape": lambda seen, state: Decision(seen.canvas, {"kept": state["kept"][:, :1, :0]}),
    "NaN in a field": lambda seen, state: Decision(
        seen.canvas, {"kept": state["kept"] / (seen.params.seed != 1)[:, None, None]}
    ),
}


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Let policies be those that packages offer."""
    caches = [each for each in vars(registry).values() if isinstance(each, functools._lru_cache_wrapper)]

    def forget() -> None:
        for cache in caches:
            cache.cache_clear()

    def offer(**policies: object) -> None:
        monkeypatch.setattr(f"{__name__}.OFFERED", policies)
        points = [EntryPoint(name, f"{__name__}:OFFERED.{name}", registry.GROUP) for name in policies]
        monkeypatch.setattr(registry, "entry_points", lambda group: points)
        monkeypatch.setattr(EntryPoint, "load", lambda point: load(policies[point.name]))
        forget()

    def load(policy: object) -> object:
        if isinstance(policy, Exception):
            raise policy
        return policy

    yield offer
    forget()


OFFERED: dict[str, object] = {}

PACE = TorchPolicy(grow, parameters={"pace": Parameter(2, "positions of a step", low=1, high=8, is_whole=True)})


def test_its_parameters_are_options_like_all_others(install: Callable[..., None]) -> None:
    install(steady=replace(PACE, takes=("threshold",)))
    settings = parse_server_settings({"policy": "steady", "steady_pace": 3})
    assert (settings.policy, dict(settings.parameters)) == ("steady", {"steady_pace": 3.0})
    options = parse_request_options({"dllm_policy": "steady", "dllm_steady_pace": 4, "dllm_threshold": 0.5})
    assert dict(options.parameters) == {"steady_pace": 4.0}
    check_policy_options(options, settings)
    for given, parts in (
        ({"dllm_steady_pace": 9}, ["dllm_steady_pace is 9, allowed are whole numbers from 1 to 8"]),
        ({"dllm_steady_pace": 1.5}, ["dllm_steady_pace is 1.5, allowed are whole numbers"]),
        ({"dllm_steady_pace": True}, ["dllm_steady_pace is True"]),
        ({"dllm_steady_rate": 1}, ["dllm_steady_rate is not known"]),
        ({"dllm_policy": "stedy"}, ["dllm_policy is 'stedy'", "'steady'", "did you mean 'steady'?"]),
    ):
        with pytest.raises(InvalidOptionError) as refused:
            parse_request_options(given)
        assert all(part in str(refused.value) for part in parts), str(refused.value)
    with pytest.raises(InvalidOptionError, match=r"additional_config\.dllm\.steady_pace is 0, allowed are whole"):
        parse_server_settings({"steady_pace": 0})
    with pytest.raises(InvalidOptionError, match=r"dllm_steady_pace is 2\.0, but the request's policy 'static' does"):
        check_policy_options(parse_request_options({"dllm_steady_pace": 2, "dllm_policy": "static"}), settings)


def test_a_graph_file_keeps_its_parameters(install: Callable[..., None]) -> None:
    install(steady=PACE)
    settings = parse_server_settings({"policy": "steady", "steady_pace": 3})
    assert decoding_settings(settings) == {"block_length": 32, "policy": "steady", "steady_pace": 3.0}
    assert "--policy steady --parameter steady_pace=3 " in calibrate_command(settings, None)
    assert given_parameters(["steady_pace=3"]) == {"steady_pace": 3}
    graph = json.loads(dump_graph(GraphFile(CHAIN, PROVENANCE)))
    graph["provenance"]["settings"] = settings.model_dump()
    read = parse_graph(graph).provenance
    assert getattr(read, "settings", None) == settings
    graph["provenance"]["settings"]["steady_pace"] = 0
    with pytest.raises(GraphError, match=r"provenance.settings.steady_pace is 0, allowed are whole numbers from 1"):
        parse_graph(graph)


@pytest.mark.parametrize(
    ("name", "policy", "message"),
    [
        ("static", PACE, "'static' of group vllm_dllm.policies .* has the name of another policy"),
        ("local_leap", PACE, "has the name of another policy"),
        ("My", PACE, "has no name of a policy; allowed are words like 'my_policy'"),
        ("mine", grow, "'mine' .* is a function, allowed is a TorchPolicy"),
        ("mine", ImportError("no module"), r"'mine' .* cannot be loaded \(ImportError: no module\).*mend or uninstall"),
    ],
)
def test_what_is_no_policy_is_refused_at_start(
    install: Callable[..., None], name: str, policy: object, message: str
) -> None:
    install(**{name: policy})
    with pytest.raises(ConfigError, match=message):
        parse_server_settings({"policy": name, f"{name}_pace": 2})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"takes": ("factor",)}, r"takes has \['factor'\], allowed are"),
        ({"state": {"step": StateField(1, torch.int64, 0)}}, "state has 'step'"),
        ({"parameters": {f"p{i}": Parameter(1, "") for i in range(9)}}, "parameters has 9, allowed are at most 8"),
    ],
)
def test_declarations_that_cannot_work(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(PACE, **changes)


def test_it_decides_beside_native_ones_and_drafts_change_nothing(install: Callable[..., None]) -> None:
    per_request = StateField(1, torch.int64, 0, per="request")
    install(steady=PACE, faster=TorchPolicy(count, state={"count": per_request}))
    requests = [Own("steady", (("pace", 3),)), Own("threshold"), Own("faster"), Own("steady"), Own("credit")]
    model = SyntheticModel(LENGTH, 1, 8.0)
    plain = decode(model, requests, num_blocks=3)
    drafted = decode(model, requests, CHAIN, 7, num_blocks=3)
    assert [each.tokens for each in drafted] == [each.tokens for each in plain]
    # 3, 3, 2 a block; 1, 2, 3, 2 and 5, 3 and 7, 1; 2, 2, 2, 2.
    assert [plain[i].steps for i in (0, 2, 3)] == [drafted[i].steps for i in (0, 2, 3)] == [9, 8, 12]
    assert decode(model, requests[1:2], num_blocks=3)[0] == plain[1]
    assert drafted[0].accepted > 0


def test_what_is_kept_of_a_request_is_what_it_was_between_the_blocks_where_a_look_ahead_came_true(
    install: Callable[..., None],
) -> None:
    """The step that ended the block has decided the next one's root as well, which is decided again."""

    def one(seen: Seen, state: PolicyState) -> Decision:
        chosen = seen.highest(seen.confidence, torch.ones_like(seen.step))
        return Decision(seen.unmask(chosen), {"count": state["count"] + 1})

    install(one=TorchPolicy(one, state={"count": StateField(1, torch.int64, 0, per="request")}))
    model, request = ChainModel(4, 1, 12.0), Own("one")
    state = CanvasState(2, 4, MASK, CPU, SDAR)
    row, drafter = Row(request, 0, state, 6), drafter_of(CHAIN, is_native=False)
    state.apply_staged_writes()
    denoiser = Denoiser(state, drafter, LogitsHead(lambda hidden: hidden.clone(), VOCAB, MASK, is_native=False))
    came_over = []
    while row.start < row.end:
        start, num_over = row.start, row.num_over
        step(model, denoiser, row, 7, 4)
        if row.start == start:
            continue
        came_over.append(row.num_over > num_over)
        assert state.apart.state("one", torch.tensor([0]))["count"].item() == row.start + came_over[-1]
        preempted = deepcopy(state.apart)
        preempted.put(1, "one", (), str(request), row.start)
        assert preempted.state("one", torch.tensor([1]))["count"].item() == row.start
    assert any(came_over)


def test_it_is_shown_each_canvas_that_comes_true_once_and_no_other(install: Callable[..., None]) -> None:
    """Not those of requests whose walk has ended while a neighbour's goes on, nor next roots that nobody came to."""
    wrong: list[torch.Tensor] = []

    def one(seen: Seen, state: PolicyState) -> Decision:
        num_masked, left = seen.is_masked.sum(1), state["left"][:, 0, 0]
        expected = torch.where((seen.step == 0) & (left == 0), LENGTH - seen.params.num_known, left)
        wrong.append(num_masked != expected)
        chosen = seen.highest(seen.confidence, torch.ones_like(seen.step))
        return Decision(seen.unmask(chosen), {"left": (num_masked - 1)[:, None, None]})

    install(one=TorchPolicy(one, state={"left": StateField(1, torch.int64, 0, per="request")}))
    requests = [Own("one"), Own("one", tail=(2, 4, 6)), Own("one", tail=(8,))]
    for seed in range(3):
        model = SyntheticModel(LENGTH, seed, 3.0)
        plain = decode(model, requests, num_blocks=2)
        assert [each.tokens for each in decode(model, requests, CHAIN, 7, num_blocks=2)] == [e.tokens for e in plain]
        rows = look_ahead_decode(ChainModel(LENGTH, seed, 12.0), requests, CHAIN, 7, 3, is_native=False)
        assert any(row.num_over for row in rows)
    assert not torch.cat(wrong).any()


@pytest.mark.parametrize("makes", ["an exception", "NaN"])
def test_a_request_whose_walk_has_ended_is_not_failed_by_its_neighbours_drafts(
    install: Callable[..., None], makes: str
) -> None:
    def one(seen: Seen, state: PolicyState) -> Decision:
        num_masked = seen.is_masked.sum(1).double()[:, None, None]
        is_fewer = num_masked < state["left"]
        if makes == "an exception" and not is_fewer.all():
            raise ValueError("a canvas twice")
        chosen = seen.highest(seen.confidence, torch.ones_like(seen.step))
        return Decision(seen.unmask(chosen), {"left": torch.where(is_fewer, num_masked, torch.nan)})

    install(one=TorchPolicy(one, state={"left": StateField(1, torch.float64, 99.0, per="block")}))
    requests = [Own("one"), Own("one", tail=(2, 4, 6)), Own("threshold")]
    for seed in range(3):
        done = decode(SyntheticModel(LENGTH, seed, 3.0), requests, CHAIN, 7)
        assert not any(each.failed for each in done)
        assert done[0].accepted > 0


def test_one_that_unmasks_nothing_takes_the_surest_position(install: Callable[..., None]) -> None:
    install(lazy=TorchPolicy(lambda seen, _: Decision(seen.canvas)))
    model = SyntheticModel(LENGTH, 2, 3.0)
    lazy, static = decode(model, [Own("lazy"), Own("static", steps=LENGTH)])
    assert (lazy.tokens, lazy.steps) == (static.tokens, LENGTH)


def test_one_that_masks_everything_again_is_bounded(install: Callable[..., None]) -> None:
    def undo(seen: Seen, _state: PolicyState) -> Decision:
        return Decision(torch.where((seen.step % 2 == 0)[:, None], seen.token_ids, MASK), is_done=seen.step < 0)

    install(undo=TorchPolicy(undo, tokens_change=True))
    (done,) = decode(SyntheticModel(LENGTH, 2, 3.0), [Own("undo", tail=(8, 8))])
    assert (len(done.tokens), done.tokens[:2]) == (LENGTH, [8, 8])
    assert CHANGING_STEPS * LENGTH <= done.steps <= (CHANGING_STEPS + 1) * LENGTH


def test_it_sees_the_probabilities_of_known_tokens(install: Callable[..., None]) -> None:
    """Those of each canvas, a draft's too, beside a policy that asks the head for ids of its own."""
    seen_by_it: list[tuple[torch.Tensor, torch.Tensor]] = []

    def look(seen: Seen, _state: PolicyState) -> Decision:
        seen_by_it.append((seen.canvas, seen.known_probability))
        return Decision(seen.unmask(seen.highest(seen.confidence, torch.ones_like(seen.step))))

    install(look=TorchPolicy(look, asks_known=True))
    model = SyntheticModel(LENGTH, 3, 8.0)
    for others in ([], [Own("credit")]):
        (done, *_) = decode(model, [Own("look"), *others], CHAIN, 7)
        assert done.accepted > 0
    assert len(seen_by_it) >= 2 * LENGTH
    for canvas, found in seen_by_it:
        logits = model.block_logits(canvas).double()
        logits[..., MASK] = -torch.inf
        expected = logits.softmax(-1).gather(-1, canvas[..., None])[..., 0]
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("fault", [*FAULTS, "raises"])
def test_a_request_at_which_it_fails_ends_and_no_other(
    install: Callable[..., None], fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    decide = raise_at if fault == "raises" else returns(FAULTS[fault])
    install(mine=TorchPolicy(decide, state={"kept": StateField(1, torch.float64, 0.0)}))
    requests = [Own("mine", seed=0), Own("mine", seed=1), Own("threshold"), Own("mine", seed=2)]
    model = SyntheticModel(LENGTH, 3, 3.0)
    done = decode(model, requests, CHAIN, 5)
    assert [each.failed for each in done] == [False, True, False, False]
    assert [len(each.tokens) for each in done] == [LENGTH, 0, LENGTH, LENGTH]
    assert done[0].tokens == done[3].tokens == decode(model, [Own("static", steps=LENGTH)])[0].tokens
    assert "'mine'" in caplog.text
