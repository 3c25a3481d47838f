"""The page's functions that need no page, in a JavaScript engine without one: streams, frames, requests, files."""

import json
import re
import subprocess
from typing import Any

import pytest
import quickjs

from tests.studio.streams import LOGPROBS, TOKENS, drafted, events_of, plain, recording_of, tokens
from vllm_dllm.studio.page import VERSION, live_page, recorded_page
from vllm_dllm.studio.record import NAMES, Question

PAGE = live_page("http://127.0.0.1:8000")
LOGIC = re.search(r'<script id="logic">(.*?)</script>', PAGE, re.S)[1]


@pytest.fixture(scope="module")
def call() -> Any:
    """Calls an expression of `studio` with JSON values; returns its JSON value."""
    context = quickjs.Context()
    context.eval(LOGIC)

    def run(expression: str, **values: Any) -> Any:
        for name, value in values.items():
            context.set("given", json.dumps(value))
            context.eval(f"globalThis.{name} = JSON.parse(given)")
        return json.loads(context.eval(f"JSON.stringify({expression})"))

    return run


def film(call: Any, chunks: list[dict[str, Any]]) -> dict[str, Any]:
    return call("studio.film({events})", events=events_of(chunks))


def texts(frame: dict[str, Any]) -> list[str | None]:
    return [cell and cell["text"] for cell in frame["cells"]]


def test_a_stream_is_read_however_it_is_cut(call: Any) -> None:
    bodies = [{"a": "é\n\n"}, {"b": [1]}, {"c": 2}]
    text = ": a comment\n\n" + "".join(f"data: {json.dumps(body)}\r\n\r\n" for body in bodies) + "data: [DONE]\n\n"
    read = "(() => { const parse = studio.eventParser(); return pieces.flatMap((piece) => parse(piece)); })()"
    for cut in range(len(text)):
        assert call(read, pieces=[text[:cut], text[cut:]]) == bodies
    assert call(read, pieces=list(text)) == bodies
    endless = "(() => { const parse = studio.eventParser(); for (;;) parse('a'.repeat(1 << 20)); })()"
    with pytest.raises(quickjs.JSException, match="an event of more than 4194304 characters"):
        call(endless)


def test_a_request_is_the_one_that_python_sends(call: Any) -> None:
    options = {"model": "m", "api": "chat", "prompt": "it's <a>", "maxTokens": 9, "temperature": 0, "policy": ""}
    for drafts in (True, False):
        body = call("studio.requestBody(options, drafts)", options=options, drafts=drafts)
        assert body == Question("it's <a>", 9).body("m", drafts=drafts)
    more = {"seed": 3, "vllm_xargs": {"dllm_threshold": 0.8}}
    options |= {"api": "completion", "temperature": None, "policy": "threshold", "more": more}
    body = call("studio.requestBody(options, false)", options=options)
    assert (body["seed"], body["prompt"], body["logprobs"]) == (3, "it's <a>", 3)
    assert not {"messages", "temperature"} & body.keys()
    own = {"dllm_stream": "denoising", "dllm_policy": "threshold", "dllm_speculation": False, "dllm_threshold": 0.8}
    assert body["vllm_xargs"] == own


def test_curl_sends_the_request(call: Any) -> None:
    body = Question('it\'s `a` $HOME\n\\ "b"').body("m", drafts=False)
    command = 'curl() { printf "%s\\0" "$@"; }\n' + call("studio.curlOf('http://a:1', body, true)", body=body)
    done = subprocess.run(["sh", "-c", command], capture_output=True, check=True, env={"OPENAI_API_KEY": "a key"})
    words = done.stdout.decode().split("\0")[:-1]
    assert words[:2] == ["-N", "http://a:1/v1/chat/completions"]
    assert words[2:-2] == ["-H", "Content-Type: application/json", "-H", "Authorization: Bearer a key"]
    assert (words[-2], json.loads(words[-1])) == ("-d", body)
    assert "Authorization" not in call("studio.curlOf('http://a:1', {prompt: 'a'}, false)")


def test_frames_are_the_reply_under_way(call: Any) -> None:
    for chunks, num_forwards in ((drafted(), [0, 1, 2, 3, 4, 5, 6]), (plain(), list(range(11)))):
        shown = film(call, chunks)
        assert [frame["nfe"] for frame in shown["frames"]] == num_forwards
        assert texts(shown["frames"][-1]) == TOKENS
        assert shown["text"] == "".join(TOKENS[:-1])
        assert (shown["starts"], shown["isOpen"], shown["finish"]) == ([0, 4, 8], False, "stop")
        for before, after in zip(shown["frames"], shown["frames"][1:], strict=False):
            assert all(old in {None, new} for old, new in zip(texts(before), texts(after), strict=False))
            new = [cell for i, cell in enumerate(after["cells"]) if cell and [*texts(before), *[None] * 9][i] is None]
            assert {cell["nfe"] for cell in new} == {after["nfe"]}
    frames = film(call, drafted())["frames"]
    assert [texts(frame) for frame in frames[:3]] == [[], ["{", None, ": ", None], [*TOKENS[:4], *[None] * 4]]


def test_a_film_that_grows_is_the_one_of_the_whole_run_and_reads_each_event_once(call: Any) -> None:
    grow = """(() => {
      const run = { events: [] }, shown = studio.film(run), reads = events.map(() => 0);
      events.forEach((event, i) => {
        const get = (own, name) => { if (name === "1") reads[i] += 1; return Reflect.get(own, name); };
        run.events.push(new Proxy(event, { get }));
        shown.update();
        shown.update();
      });
      return { shown, reads };
    })()"""
    for chunks in (drafted(), plain(), drafted()[:4]):
        grown = call(grow, events=events_of(chunks))
        assert grown["shown"] == film(call, chunks)
        assert set(grown["reads"]) == {1}


def test_steps_add_up_to_the_numbers_of_the_reply(call: Any) -> None:
    steps = call("studio.film({events}).steps", events=events_of(drafted()))
    assert [step["unmasked"] for step in steps] == [2, 2, 1, 2, 1, 2]
    assert [step["accepted"] for step in steps] == [1, 1, 0, 1, 0, 1]
    assert [step["wasted"] for step in steps] == [2, 2, 0, 2, 3, 1]
    last = "(() => { const shown = studio.film({events}); return studio.numbersAt(shown, shown.frames.at(-1)); })()"
    numbers = call(last, events=events_of(drafted()))
    assert {name: numbers[name] for name in ("nfe", "tokens", "proposed", "accepted", "wasted")} == {
        "nfe": 6, "tokens": 10, "proposed": 14, "accepted": 4, "wasted": 10
    }  # fmt: skip
    assert numbers["speed"] == pytest.approx(1000 * 10 / 80)  # the last token came with the ninth chunk


def test_runs_are_compared_when_both_have_ended(call: Any) -> None:
    compare = "studio.compared(studio.film({events: first}), studio.film({events: second}))"
    result = call(compare, first=events_of(drafted()), second=events_of(plain()))
    assert (result["forwards"], result["isSame"]) == ([6, 10], True)
    assert result["speed"] == pytest.approx(120 / 80)
    assert call(compare, first=events_of(drafted()), second=events_of(plain()[:-3])) is None
    other = [*plain()[:-2], tokens(7, 9, (10, 0, 0))]
    assert call(compare, first=events_of(drafted()), second=events_of(other))["isSame"] is False


def test_confidence_is_of_the_canvas_and_later_of_the_tokens(call: Any) -> None:
    of_cell = "(cell, i) => cell && studio.confidence(shown, i, cell)"
    ask = f"((shown) => shown.frames.map((frame) => frame.cells.map({of_cell})))(studio.film({{events}}))"
    bare = json.loads(json.dumps(drafted()))
    for chunk in bare:
        chunk.get("dllm_canvas", {}).pop("logprobs", None)
    for chunks in (drafted(), bare):
        for row in call(ask, events=events_of(chunks)):
            known = [(p, LOGPROBS[i]) for i, p in enumerate(row) if p is not None]
            assert [p for p, _ in known] == pytest.approx([2.718281828459045**own for _, own in known])
    assert call(ask, events=events_of(drafted()[:2]))[-1][0] is not None
    assert call(ask, events=events_of(bare[:2]))[-1][0] is None
    assert [call("studio.bin(p)", p=p) for p in (0.2, 0.5, 0.94, 0.95, 0.99, 1)] == [0, 1, 2, 3, 4, 4]


def test_a_request_that_was_preempted_or_takes_tokens_back_is_shown_so(call: Any) -> None:
    chunks = drafted()
    begun, nothing = chunks[1], json.loads(json.dumps(chunks[1]))
    nothing["dllm_canvas"] |= {"tokens": [None] * 4, "token_ids": [None] * 4, "nfe": 2}
    changed = json.loads(json.dumps(begun))
    changed["dllm_canvas"]["tokens"][0] = "["
    changed["dllm_canvas"]["nfe"] = 3
    frames = film(call, [begun, nothing, changed])["frames"]
    assert [texts(frame) for frame in frames[1:]] == [["{", None, ": ", None], [None] * 4, ["[", None, ": ", None]]
    assert frames[-1]["cells"][0]["nfe"] == 3
    assert film(call, [begun, nothing])["steps"][1]["unmasked"] == 0


def test_completions_and_replies_without_logprobs_are_shown(call: Any) -> None:
    logprobs = {"tokens": ["a", "b"], "token_logprobs": [-0.5, -0.1], "top_logprobs": [{"a": -0.5}, {"b": -0.1}]}
    last = {"index": 0, "text": "ab", "logprobs": logprobs, "finish_reason": "length"}
    shown = film(call, [{"choices": [last], "kv_transfer_params": {"dllm": {"exactness": None, "nfe": 3}}}])
    assert (shown["text"], texts(shown["frames"][-1]), shown["frames"][-1]["nfe"]) == ("ab", ["a", "b"], 3)
    assert shown["emitted"][0]["top"] == [["a", -0.5]]
    bare = json.loads(json.dumps(drafted()))
    for chunk in bare:
        for choice in chunk["choices"]:
            choice.pop("logprobs", None)
    shown = film(call, bare)
    assert shown["frames"][-1]["nfe"] == 6
    assert texts(shown["frames"][2])[:4] == ["{", None, ": ", None]


def test_ends_and_blanks_can_be_seen(call: Any) -> None:
    for text, shown in {"<|endoftext|>": "∎", "</s>": "∎", "\n": "⏎", "  ": "␣␣", " a": " a", "<b>": "<b>"}.items():
        assert call("studio.shownText(text).text", text=text) == shown


def test_a_saved_page_is_the_one_that_python_makes(call: Any) -> None:
    runs = [
        {"name": NAMES[drafts], "body": Question("</script>$&").body("m", drafts=drafts), "events": events_of(chunks)}
        for drafts, chunks in ((True, drafted()), (False, plain()))
    ]
    about = {"model": "m", "prompt": "</script>$& <!--", "created": "now"}
    recording = {"version": VERSION, **about, "runs": runs}
    page = call("studio.embedded(page, studio.recordingOf(runs, about))", page=PAGE, runs=runs, about=about)
    assert recording_of(page) == recording
    rest = re.compile(r'(id="given">)[^<]*')
    assert rest.sub(r"\1", page) == rest.sub(r"\1", recorded_page(recording))
    again = call("studio.embedded(page, studio.checked(recording))", page=page, recording=recording)
    assert again == page
    with pytest.raises(quickjs.JSException, match="of version 2, this page shows version 1"):
        call("studio.checked({version: 2})")
