"""What better token guesses would save, counted on hand-made traces."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.ablations import token_odds
from benchmarks.ablations.drafting import BUDGETS, Material
from benchmarks.ablations.ranker import forwards, last_held_out
from benchmarks.ablations.token_odds import (
    FEATURES,
    MARGINS,
    Weighed,
    fit_by_margin,
    fit_weights,
    make_examples,
    pair,
    pairs,
    plain,
    texts_of,
)
from benchmarks.ablations.tokens import Guesser, ablations, prompt_tokens, report, right_shares, with_seconds
from tests.calibrate.traces import MASK, make_block, make_trace, random_trace
from vllm_dllm.calibrate.build import make_graph
from vllm_dllm.calibrate.count import Decoding, anchor_paths
from vllm_dllm.calibrate.fit import fit_readiness
from vllm_dllm.calibrate.prompts import read_prompts
from vllm_dllm.calibrate.tokens import fit_token_weights
from vllm_dllm.config import DllmConfig
from vllm_dllm.draft.graph import DraftGraph
from vllm_dllm.draft.token_weights import NONE
from vllm_dllm.errors import ConfigError

COLUMN = {name: columns[0] for name, columns in FEATURES.items()}


def make_material(most_per_step: int) -> Material:
    rng = np.random.default_rng(3)
    traces = [random_trace(rng, prompt_idx=i, most_per_step=most_per_step, num_blocks=1) for i in range(6)]
    policy = "static" if most_per_step == 1 else "threshold"
    return last_held_out(Material(traces, [], DllmConfig(block_length=8, policy=policy), Decoding(MASK)), 3)


@pytest.fixture(scope="module", params=[1, 3], ids=["one", "varying"])
def material(request: pytest.FixtureRequest) -> Material:
    return make_material(request.param)


PROMPTS = [[5, 6, 7]] * 6


def texts(material):
    return texts_of([*material.used, *material.held_out], PROMPTS)


class TestWithTheProbabilitiesAsTheyAre:
    """The measurement makes the graphs and drafts that the engine's own code makes."""

    def test_graph_and_forwards_are_those_that_serve(self, material):
        guesser = Guesser(material, texts(material), plain)
        graph = make_graph(material.used, material.decoding, material.settings, 32)
        assert guesser.graph() == graph
        expected = forwards(graph, material.held_out, material.decoding)
        for found, served in zip(guesser.forwards(graph), expected, strict=True):
            assert (found == served).all()

    def test_paths_are_those_that_are_counted(self, material):
        decoding = material.decoding
        per_step = 1 if material.settings.policy == "static" else None
        readiness = fit_readiness(material.used, MASK, per_step)
        paths = Guesser(material, texts(material), plain).paths()
        assert paths == anchor_paths(material.used, replace(decoding, readiness=readiness))
        assert any(len(path) > 2 for path in paths)

    def test_graph_and_forwards_by_token_weights_are_those_that_serve(self, material):
        tokens = fit_token_weights(material.used, MASK)
        assert tokens is not None
        weights = torch.tensor([tokens.slope, tokens.slope_beside_new, *tokens.same, 0, 0], dtype=torch.float64)
        guesser = Guesser(material, texts(material), Weighed(weights))
        graph = make_graph(material.used, replace(material.decoding, tokens=tokens), material.settings, 32)
        measured = guesser.graph()
        assert (measured.formulas, measured.counts) == (graph.formulas, graph.counts)
        assert graph.tokens == tokens
        expected = forwards(graph, material.held_out, material.decoding)
        for found, served in zip(guesser.forwards(measured), expected, strict=True):
            assert (found == served).all()


def test_odds_decide_which_token_a_draft_has():
    """The second candidate is always right; who knows it needs the fewest forwards."""
    block = make_block([50, 51, 52, 53], [[0], [1], [2], [3]], [0.9, 0.8, 0.7, 0.6], wrong=[0, 1, 2, 3])
    traces = [make_trace(block, prompt_idx=i) for i in range(2)]
    material = Material(traces[:1], traces[1:], DllmConfig(block_length=4, policy="static"), Decoding(MASK))

    def second_first(token_ids, log_probs, beside, text):
        return log_probs[..., [1, 0, 2, 3]]

    known = Guesser(material, texts_of(traces, PROMPTS), second_first)
    assert all(vocab == 0 for formula in known.graph().formulas for _, vocab in formula)
    served = Guesser(material, texts_of(traces, PROMPTS), plain)
    assert all(vocab == 1 for formula in served.graph().formulas for _, vocab in formula)
    chain = DraftGraph((((0, 0),), ((0, 0), (1, 0))), 1)
    assert known.forwards(chain)[0].tolist() == [[3, 1]]
    assert served.forwards(chain)[0].tolist() == [[3, 3]]


class TestFeatures:
    def test_pairs_are_of_what_was_known_when_the_block_began(self):
        first = make_block([50, 51], [[0], [1]], [0.9, 0.8], start=3)
        second = make_block([52, 53], [[0], [1]], [0.9, 0.8], start=5)
        trace = make_trace(first, second)
        found = texts_of([trace], [[5, 6, 7]])
        both = [(5, 6), (6, 7)]
        assert found[0, 3].tolist() == [(a << 32) + b for a, b in both]
        assert found[0, 5].tolist() == [(a << 32) + b for a, b in (*both, (7, 50), (50, 51))]
        alone = texts_of([trace], [[5, 6, 7]], is_prompt_alone=True)
        assert alone[0, 5].tolist() == found[0, 3].tolist()

    def test_a_block_that_begins_in_the_prompt_is_not_known_before(self):
        block = make_block([6, 51], [[0], [1]], [0.9, 0.8], start=1)
        assert texts_of([make_trace(block)], [[5, 6]])[0, 1].tolist() == []

    def test_what_they_say(self):
        token_ids, log_probs = torch.tensor([[10, 11, 12]]), torch.tensor([[-1.0, -2.0, -30.0]], dtype=torch.float64)
        text = pairs([10, 11, 10, 20])
        beside = torch.tensor([[10, 20, NONE, 12]])
        found = token_odds.features(token_ids, log_probs, beside, text)[0]
        assert found[:, COLUMN["probability"]].tolist() == [-1.0, -2.0, -20.0]
        assert found[:, COLUMN["probability beside a new token"]].tolist() == [-1.0, -2.0, -20.0]
        assert found[:, 2:6].T.tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 1]]
        assert found[:, 6].tolist() == [0, 1, 0], "10 11 is in the text"
        assert found[:, 7].tolist() == [1, 0, 0], "10 20 is in the text"
        old = token_odds.features(token_ids, log_probs, torch.full((1, 4), NONE), text)[0]
        assert old[:, 1:].abs().sum() == 0

    def test_a_pair_with_what_is_no_token_is_in_no_text(self):
        token_ids = torch.tensor([[0, 1]])
        text = torch.cat([pair(torch.tensor([NONE]), token_ids[0]), pair(token_ids[0], torch.tensor([NONE]))])
        found = token_odds.features(token_ids, torch.zeros(1, 2), torch.full((1, 4), NONE), text)
        assert found[..., 6:].sum() == 0


class TestFits:
    def examples(self, num_examples=4000):
        """Tokens that come by known odds, of four candidates; half of the positions are beside a new token."""
        generator = torch.Generator().manual_seed(0)
        token_ids = torch.arange(4).expand(num_examples, -1)
        log_probs = (torch.rand(num_examples, 4, generator=generator, dtype=torch.float64) * 3).log_softmax(-1)
        log_probs = log_probs.sort(descending=True)[0]
        beside = torch.full((num_examples, 4), NONE)
        beside[::2, 0] = torch.randint(0, 4, (num_examples // 2,), generator=generator)
        described = token_odds.features(token_ids, log_probs, beside, pairs([1, 2, 1, 3]))
        scores = 2.0 * described[..., 0] - 1.0 * described[..., 1] - 1.5 * described[..., 2] + 2.5 * described[..., 6]
        truth = torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0]
        return token_odds.Examples(log_probs, beside, described, truth)

    def test_weights_are_found_again(self):
        found = fit_weights(self.examples(), tuple(FEATURES)).weights.tolist()
        assert found == pytest.approx([2.0, -1.0, -1.5, 0, 0, 0, 2.5, 0], abs=0.25)

    def test_a_feature_that_is_left_out_weighs_nothing(self):
        found = fit_weights(self.examples(), ("probability", "same as a new neighbour")).weights
        assert found[[1, 6, 7]].tolist() == [0, 0, 0]
        assert found[0] > 0
        assert found[2] < 0

    def test_weighed_odds_are_probabilities(self):
        examples = self.examples(10)
        odds = fit_weights(examples, ("probability",))(
            torch.arange(4).expand(10, -1), examples.log_probs, examples.beside, pairs([])
        )
        assert odds.exp().sum(-1).tolist() == pytest.approx([1.0] * 10)

    def test_shares_by_margin(self):
        examples = self.examples()
        odds = fit_by_margin(examples)
        margin = examples.log_probs[:, 0] - examples.log_probs[:, 1]
        chosen = (margin > MARGINS[0]) & (margin <= MARGINS[1]) & (examples.beside[:, 0] != NONE)
        share = (examples.truth[chosen] == 0).double().mean()
        row = odds(torch.arange(4).expand(len(chosen), -1), examples.log_probs, examples.beside, pairs([]))[chosen]
        assert (row == row[0]).all()
        assert math.exp(row[0, 0]) == pytest.approx(share, abs=0.01)
        assert row[0].exp().sum() == pytest.approx(1.0)


def test_second_candidates_stand_behind_what_serves():
    graph = DraftGraph((((0, 0),), ((1, 0),), ((0, 0), (1, 0))), 1)
    found = with_seconds(graph)
    assert found[:3] == graph.formulas
    assert found[3:] == (((0, 1),), ((1, 1),), ((0, 0), (1, 1)))
    assert all(DraftGraph(found, 1).parents), "each hangs on the root"
    large = DraftGraph(tuple(((rank, 0),) for rank in range(40)), 1)
    assert len(with_seconds(large)) == 64


def test_the_report(material):
    lines = list(report(material, PROMPTS))
    names = [line.split("|")[1].strip() for line in lines[2:] if line.startswith("|")]
    assert names[:3] == ["by probability", "with second candidates", "fewer"]
    assert names.count("fewer") == len(names) // 2
    shares = [line for line in lines if re.match(r"[01]\.\d{3} ", line)]
    assert len(shares) == 6
    _, counts = next(ablations(material, PROMPTS))
    assert [each.shape for each in counts] == [(3, 2)] * len(BUDGETS)
    examples = make_examples(material.held_out, texts(material), MASK)
    assert dict(right_shares(material, texts(material)))["by probability"] == examples.num_first / len(examples.truth)


def test_noise_is_what_is_varied_at_a_temperature(material):
    hot = replace(material, decoding=replace(material.decoding, temperature=1.0))
    assert [name for name, _ in ablations(hot, PROMPTS)] == ["as served", "without the decoder's noise"]
    assert not any("first guess" in line for line in report(hot, PROMPTS))
    with pytest.raises(ConfigError, match="policy 'random', whose order is known"):
        list(report(replace(material, decoding=Decoding(MASK, is_random=True)), PROMPTS))


def test_prompts_of_another_file_are_refused(tmp_path):
    prompts, traces = tmp_path / "prompts.jsonl", tmp_path / "graph.json.traces"
    prompts.write_text('{"text": "a"}\n{"text": "b"}\n')
    model = str(Path(__file__).parents[2] / "examples/tiny_llada/checkpoint")
    head = {"model": model, "samples": 2, "prompts (SHA-256)": read_prompts(prompts, 2).sha256}
    traces.write_text(json.dumps({"settings": head}) + "\n")
    assert len(prompt_tokens(traces, prompts)) == 2
    traces.write_text(json.dumps({"settings": head | {"prompts (SHA-256)": "0" * 64}}) + "\n")
    with pytest.raises(ConfigError, match=r"--prompts is .* but .* has the traces of a file with 0000"):
        prompt_tokens(traces, prompts)
