"""Edits of logits: equal to their plain statement with any drafts, and nothing to who is beside them."""

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.draft.test_exact import DREAM, LLADA, SDAR, Request, graphs, requests_of
from tests.suite.parts import some_of
from tests.unmask.edited import TOKENS, BlockModel, Edited, answers, edits
from vllm_dllm.state.edits import NO_EDITS, LogitEdits
from vllm_dllm.unmask.schedule import UnmaskRules

NUM_BLOCKS = 4


@st.composite
def edited_requests(draw: st.DrawFn, block_length: int, rules: UnmaskRules) -> Edited:
    request = draw(requests_of(block_length, rules))
    prompt_len = block_length * draw(st.integers(1, 2)) + len(request.tail)
    prompt = draw(st.lists(TOKENS, min_size=prompt_len, max_size=prompt_len))
    own = draw(st.just(NO_EDITS) | edits(temperature=request.temperature))
    if request.policy == "credit":
        own = LogitEdits(**{name: getattr(own, name) for name in LogitEdits.__slots__ if name != "min_p"})
    return Edited(request, tuple(prompt), own)


def has_word(answer: list[int], word: tuple[int, ...]) -> bool:
    return any(tuple(answer[i : i + len(word)]) == word for i in range(len(answer)))


@settings(max_examples=some_of(150), deadline=None)
@given(
    data=st.data(),
    block_length=st.sampled_from([1, 4, 5]),
    sharpness=st.sampled_from([0.0, 3.0, 12.0]),
    is_native=st.booleans(),
    rules=st.sampled_from([LLADA, DREAM, SDAR]),
)
def test_edits_equal_their_plain_statement(
    data: st.DataObject, block_length: int, sharpness: float, is_native: bool, rules: UnmaskRules
) -> None:
    model = BlockModel(block_length, data.draw(st.integers(0, 99)), sharpness)
    requests = data.draw(st.lists(edited_requests(block_length, rules), min_size=1, max_size=4))
    graph = data.draw(graphs(block_length))
    plain = answers(model, requests, None, 0, NUM_BLOCKS, is_native=is_native, rules=rules)
    assert plain == [request.reference(model, NUM_BLOCKS, rules) for request in requests]
    budget = data.draw(st.integers(1, len(graph)))
    assert answers(model, requests, graph, budget, NUM_BLOCKS, is_native=is_native, rules=rules) == plain
    for request, answer in zip(requests, plain, strict=True):
        own = request.edits
        assert not any(has_word(answer, word) for word in own.bad_words)
        assert not {*answer[: own.min_tokens]} & {*own.end_ids}
        assert not own.allowed_ids or {*answer} <= {*own.allowed_ids}
        alone = answers(model, [request], None, 0, NUM_BLOCKS, is_native=is_native, rules=rules)
        assert alone == [answer]


def test_a_word_that_one_step_would_complete_waits() -> None:
    """Every position wants the same token, and one step may unmask them all."""
    model, own = BlockModel(4, 0, 3.0), LogitEdits(bias=((5, 100.0),), bad_words=((5, 5), (5, 6, 5)))
    request = Edited(Request("static", 0.9, 1, 0.0, 0, 1.0, 0), (7, 7, 7, 7), own)
    (answer,) = answers(model, [request], None, 0, NUM_BLOCKS, rules=LLADA)
    assert answer == request.reference(model, NUM_BLOCKS, LLADA)
    assert answer.count(5) > 3
    assert not any(has_word(answer, word) for word in own.bad_words)
