"""What a request asks of its logits, read from vLLM's parameters."""

from vllm.sampling_params import SamplingParams

from vllm_dllm.engine.edits import edits_of


def test_what_is_named_often_takes_room_once() -> None:
    """A slot's lists are as long for all slots, so no request may make them longer than what they say."""
    params = SamplingParams(allowed_token_ids=[7, 5] * 1000)
    params._bad_words_token_ids = [[1, 2], [3], [1, 2], [2, 1]]
    found = edits_of(params)
    assert (found.allowed_ids, found.bad_words) == ((7, 5), ((1, 2), (3,), (2, 1)))
