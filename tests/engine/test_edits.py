"""What a request asks of its logits, read from vLLM's parameters."""

import pytest
from vllm.sampling_params import SamplingParams

from vllm_dllm.engine.edits import check_edits, edits_of
from vllm_dllm.engine.refusals import RequestError

MASK, EOS, VOCAB = 3, 1, 9


def test_what_is_named_often_takes_room_once() -> None:
    """A slot's lists are as long for all slots, so no request may make them longer than what they say."""
    params = SamplingParams(allowed_token_ids=[7, 5] * 1000)
    params._bad_words_token_ids = [[1, 2], [3], [1, 2], [2, 1]]
    found = edits_of(params)
    assert (found.allowed_ids, found.bad_words) == ((7, 5), ((1, 2), (3,), (2, 1)))


@pytest.mark.parametrize(
    ("changes", "words", "never", "field"),
    [
        ({"allowed_token_ids": [MASK]}, [], None, "allowed_token_ids"),
        ({"allowed_token_ids": [EOS]}, [], EOS, "allowed_token_ids"),
        ({"allowed_token_ids": [EOS, 5]}, [[5]], EOS, "allowed_token_ids"),
        ({"allowed_token_ids": [5, 6], "stop_token_ids": [5], "min_tokens": 1}, [[6, 7]], None, "allowed_token_ids"),
        ({"stop_token_ids": [*range(VOCAB)], "min_tokens": 1}, [], None, "stop_token_ids"),
        ({"stop_token_ids": [0, 2, 4, 5, 6], "min_tokens": 1}, [[7], [8]], EOS, "stop_token_ids"),
        ({}, [[token] for token in range(VOCAB)], None, "bad_words"),
        ({}, [[0], [2], [4], [5], [6, 7], [8]], EOS, "bad_words"),
    ],
)
def test_a_token_is_left_for_every_position(
    changes: dict[str, list[int] | int], words: list[list[int]], never: int | None, field: str
) -> None:
    def check(left_out: int | None) -> None:
        """Check the request, without one of its tokens where one is left out."""
        own = {
            name: [t for t in its if t != left_out] if isinstance(its, list) else its for name, its in changes.items()
        }
        if left_out is not None and "allowed_token_ids" in changes:
            own["allowed_token_ids"] = [*changes["allowed_token_ids"], 0]  # type: ignore[misc]
        params = SamplingParams(bad_words=["a"] if words else [], max_tokens=8, **own)  # type: ignore[arg-type]
        params._bad_words_token_ids = [word for word in words if left_out not in word]
        check_edits(params, MASK, VOCAB, never)

    with pytest.raises(RequestError, match=f"^{field} is .* left without any") as refused:
        check(None)
    assert refused.value.parameter == field
    check(8)
