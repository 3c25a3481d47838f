"""`vllm serve --speculative-config FILE`: the same tokens, what each reply took, and the metrics."""

import json
import re
import runpy
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from tests.e2e.ended import check_forwards
from tests.e2e.http import MODEL, complete, lines_we_cause, server
from tests.e2e.rig import CHECKPOINT, Oracle, mixed_cases
from vllm_dllm.reference.loglikelihood import loglikelihood

pytestmark = [pytest.mark.engine, pytest.mark.xdist_group("server")]

SETTINGS = {"block_length": 8}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the server writes its log."""
    return tmp_path_factory.mktemp("server") / "log"


@pytest.fixture(scope="module")
def client(log: Path) -> Iterator[openai.OpenAI]:
    folder = log.parent
    (folder / "spiffy.json").write_text(json.dumps({"method": "spiffy", "budget": 3}))
    with server(log, SETTINGS, "--speculative-config", str(folder / "spiffy.json")) as client:
        yield client


def test_the_log_of_the_start_says_what_is_true(client: openai.OpenAI, log: Path) -> None:
    assert lines_we_cause(log, "speculative_config=None") == []
    text = log.read_text()
    assert "speculative_config={'method': 'spiffy', 'draft_graph': 'default', 'budget': 3}" in text
    assert (
        "requests get {'temperature': 0.0, 'max_new_tokens': 128}, the family's defaults, unless they say otherwise"
        in text
    )


def metrics(client: openai.OpenAI) -> dict[str, dict[str, float]]:
    """Read our metrics: name -> labels of ours, as text -> value."""
    text = client._client.get(str(client.base_url).replace("/v1/", "/metrics")).text
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for name, labels, value in re.findall(r"^vllm:dllm_(\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        own = [label for label in labels.split(",") if not label.startswith(("engine=", "model_name="))]
        found[name][",".join(own)] = float(value)
    return found


def test_replies_equal_reference_and_tell_what_they_took(client: openai.OpenAI, trained: Oracle) -> None:
    cases = mixed_cases(8, seed=1)
    with ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(lambda case: complete(client, case), cases))
    assert [reply.choices[0].token_ids for reply in replies] == [trained.tokens(case, SETTINGS) for case in cases]
    took = [reply.kv_transfer_params["dllm"] for reply in replies]
    assert {numbers["exactness"] for numbers in took} == {"exact"}
    check_forwards(trained, cases, SETTINGS, took)
    assert sum(n["accepted"] for n in took) > 0


def test_chat_tells_what_it_took(client: openai.OpenAI) -> None:
    reply: Any = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Sort 3 1 7 2"}], max_tokens=32
    )
    assert reply.choices[0].message.content == "1 2 3 7"
    assert reply.kv_transfer_params["dllm"]["nfe"] < 32


def test_vllm_s_benchmark_prints_what_diffusion_took(
    client: openai.OpenAI, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """By the names of vLLM's metrics; it takes a commit off for each block, and divides by the steps that are left."""
    from vllm.benchmarks import serve as bench
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    before = metrics(client)
    arguments = [
        "--base-url",
        str(client.base_url).removesuffix("/v1/"),
        "--model",
        MODEL,
        "--tokenizer",
        str(CHECKPOINT),
    ]
    arguments += ["--dataset-name", "random", "--random-input-len", "8", "--random-output-len", "16"]
    arguments += ["--num-prompts", "4", "--ignore-eos", "--temperature", "0", "--disable-tqdm"]
    parser = FlexibleArgumentParser()
    bench.add_cli_args(parser)
    result = bench.main(parser.parse_args(arguments))
    after = metrics(client)
    took = {
        name: after[f"{name}_total"][""] - before[f"{name}_total"].get("", 0)
        for name in ("forwards", "refreshes", "blocks")
    }
    assert (result["completed"], took["blocks"], result["diffusion_committed_tokens"]) == (4, 8, 64)
    nfe = took["forwards"] + took["refreshes"]
    assert result["diffusion_denoising_steps"] == nfe
    assert result["diffusion_steps_per_canvas"] == nfe / 8
    assert result["diffusion_committed_per_step"] == 64 / nfe
    assert "Diffusion Decoding" in capsys.readouterr().out


def test_metrics_add_up(client: openai.OpenAI) -> None:
    cases = mixed_cases(8, seed=2)
    before = metrics(client)
    with ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(lambda case: complete(client, case), cases))
    took = [reply.kv_transfer_params["dllm"] for reply in replies]
    after = metrics(client)
    for _ in range(100):  # the server exports its counters a moment after its replies
        if sum(after["forwards_total"].values()) == sum(metrics(client)["forwards_total"].values()):
            break
        after = metrics(client)

    def counted(name: str) -> float:
        return sum(after[name].values()) - sum(before[name].values())

    assert counted("forwards_total") + counted("refreshes_total") == sum(n["nfe"] for n in took)
    assert counted("refreshes_total") == sum(n["nfe_refresh"] for n in took)
    assert counted("draft_nodes_proposed_total") == sum(n["proposed"] for n in took)
    assert counted("draft_nodes_accepted_total") == sum(n["accepted"] for n in took)
    assert set(after["steps_total"]) <= {f'budget="{k}",exactness="exact"' for k in range(4)}


def test_a_bad_request_is_a_400_and_the_server_lives_on(client: openai.OpenAI) -> None:
    for bad in ({"dllm_policy": "best"}, {"dllm_budget": -1}, {"dllm_threshold": 2.0}):
        with pytest.raises(openai.BadRequestError, match="dllm_"):
            client.completions.create(model=MODEL, prompt="1", max_tokens=8, extra_body={"vllm_xargs": bad})
    assert client.completions.create(model=MODEL, prompt="1 + 2 = ?", max_tokens=8).choices


TALK = [{"role": "user", "content": "61 + 27 = ?"}]


def test_log_probabilities_are_shown_in_every_api(client: openai.OpenAI, trained: Oracle) -> None:
    case = mixed_cases(8, seed=1)[2]
    expected = trained.generation(case, SETTINGS).log_probs
    likeliest = expected.sort(descending=True).values[: case.max_tokens, :3]
    own = [float(row[token]) for row, token in zip(expected, trained.tokens(case, SETTINGS), strict=False)]

    whole = complete(client, case, logprobs=3).choices[0].logprobs
    assert whole.token_logprobs == pytest.approx(own, abs=2e-3)
    top = [sorted(place.values(), reverse=True)[:3] for place in whole.top_logprobs]
    assert top == [pytest.approx(row.tolist(), abs=2e-3) for row in likeliest]
    for options in ({}, {"vllm_xargs": case.sampling_params().extra_args | {"dllm_stream": "denoising"}}):
        chunks = list(complete(client, case, logprobs=3, stream=True, extra_body=options))
        parts = [part for chunk in chunks for part in chunk.choices if part.logprobs]
        assert [p for part in parts for p in part.logprobs.token_logprobs] == whole.token_logprobs
        assert [p for part in parts for p in part.logprobs.tokens] == whole.tokens

    asked = {"model": MODEL, "messages": TALK, "logprobs": True, "top_logprobs": 2, "max_completion_tokens": 16}
    spoken = client.chat.completions.create(**asked).choices[0].logprobs.content
    assert all(len(each.top_logprobs) == 2 for each in spoken)
    assert max(each.logprob for each in spoken) <= 0
    streamed = client.chat.completions.create(**asked, stream=True)
    told = [each for chunk in streamed for part in chunk.choices if part.logprobs for each in part.logprobs.content]
    assert told == spoken

    reply = client.responses.create(
        model=MODEL, input=TALK, include=["message.output_text.logprobs"], top_logprobs=2, max_output_tokens=16
    )
    (message,) = reply.output
    assert [each.logprob for each in message.content[0].logprobs] == [each.logprob for each in spoken]


def lm_eval_model(client: openai.OpenAI, **options: Any) -> Any:
    """lm-eval's model of our example, on the server."""
    module = runpy.run_path(str(CHECKPOINT.parents[1] / "lm_eval_dllm.py"))
    return module["DllmCompletions"](
        base_url=f"{client.base_url}completions",
        model=MODEL,
        tokenizer=str(CHECKPOINT),
        num_concurrent=3,
        tokenizer_backend="huggingface",
        **options,
    )


def test_lm_eval_generates_and_asks_for_likelihoods(client: openai.OpenAI, trained: Oracle) -> None:
    from lm_eval.api.instance import Instance

    model = lm_eval_model(client, samples=6, seed=5)
    options = {"until": ["\n\n"], "max_gen_toks": 16, "temperature": 0}
    texts = ["61 + 27 = ?", "Sort 8 0 5 3"]
    generated = model.generate_until([Instance("generate_until", {}, (text, options), 0) for text in texts])
    asked = {"model": MODEL, "max_tokens": 16, "temperature": 0}
    expected = [client.completions.create(prompt=text, **asked).choices[0].text for text in texts]
    assert generated == [text.split("\n\n")[0] for text in expected]

    pairs = [("61 + 27 =", " 88"), ("61 + 27 =", " 87"), ("Sort 8 0 5 3", " 0 3 5 8")]
    found = model.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs])
    for (value, is_greedy), pair in zip(found, pairs, strict=True):
        ids = [torch.tensor(each) for each in model._encode_pair(*pair)]
        wanted = loglikelihood(trained.model, *ids, num_samples=6, seed=5).value
        assert value == pytest.approx(wanted, abs=2e-2)
        assert not is_greedy


def test_a_question_of_likelihood_is_answered_or_refused(client: openai.OpenAI) -> None:
    route = f"{client.base_url}dllm/loglikelihood"
    question = {"context": "61 + 27 = ", "continuations": ["88", "87"], "samples": 6, "model": MODEL}

    def ask(**changes: Any) -> Any:
        headers = {"content-type": "application/json"}
        return client._client.post(route, content=json.dumps(question | changes), headers=headers)

    reply = ask().raise_for_status().json()
    assert ask().json()["choices"] == reply["choices"]
    assert [each["index"] for each in reply["choices"]] == [0, 1]
    for each in reply["choices"]:
        assert sum(each["tokens"]) == pytest.approx(each["loglikelihood"])
        assert each["standard_error"] > 0
    assert ask(seed=1).json()["choices"] != reply["choices"]
    assert ask(samples=1).json()["choices"][0]["standard_error"] is None
    for changes, status, text in (
        ({"model": "other"}, 404, "The model `other` does not exist"),
        ({"samples": 0}, 400, "samples is 0, allowed are whole numbers from 1 to 1024"),
        ({"sample": 4}, 400, "sample is 4"),
        ({"continuations": ["a", [5]]}, 400, "continuations[1] is [5], but context is '61 + 27 = '"),
        ({"continuations": "88"}, 400, "continuations is '88', allowed are lists"),
        ({"context": "\ud800"}, 400, "context has '\\ud800' at character 0"),
    ):
        refused = ask(**changes)
        assert (refused.status_code, refused.json()["error"]["message"][: len(text)]) == (status, text)
