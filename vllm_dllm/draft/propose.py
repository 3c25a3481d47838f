"""Fill the nodes of a draft graph with tokens: guesses of the states that follow a canvas.

Spiffy (arXiv:2509.18085v4) sec. 4.1. Ranks refer to the distribution that made the canvas (the root): to what the last
forward said of the positions that are masked still. At a temperature, a node is filled step by step, from its first
parent: each step draws with the noise that the decoder will use when as many positions are masked, which is known
before (`vllm_dllm.noise`); so is the order of the policy `random`. The order of `sequential`, `origin` and `alg_temp`
could be known too; there as elsewhere readiness orders the positions, so that fewer drafts come true.

A graph with token weights (ours) fills all nodes step by step, as what a position probably gets then depends on what
the node's first parent has beside it. At a temperature the noise chooses the tokens, whatever the weights are; a
look-ahead's end has the likeliest tokens by probability.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from vllm_dllm import noise
from vllm_dllm.draft.compile import CompiledGraph, Filling
from vllm_dllm.draft.prune import Filled, Ranking, rank_nodes
from vllm_dllm.draft.token_weights import NONE, OFFSETS, TokenWeights
from vllm_dllm.unmask.stats import Candidates


@dataclass(frozen=True, slots=True)
class Roots:
    """The canvases that drafts start from, and what the step that made them knew."""

    canvas: Tensor  # [num_reqs, block_length] int64
    is_masked: Tensor  # [num_reqs, block_length] bool
    is_new: Tensor  # [num_reqs, block_length] bool, unmasked by that step
    candidates: Candidates  # [num_reqs, block_length, num_candidates]
    terms: Tensor | None = None  # [num_reqs, block_length, 1 + 2 * REACH] float64, of a ranker (draft.ranker)

    @property
    def node_terms(self) -> Tensor | None:
        """The terms, of which those of a request serve all its nodes."""
        return None if self.terms is None else self.terms[:, None]


@dataclass(frozen=True, slots=True)
class Drafts:
    """Guessed canvases of some requests, best first."""

    canvas: Tensor  # [num_reqs, num_nodes, block_length] int64
    is_valid: Tensor  # [num_reqs, num_nodes] bool; invalid ones come last
    node: Tensor  # [num_reqs, num_nodes] int64, number in the graph
    depth: Tensor  # [num_reqs, num_nodes] int64, in the graph
    log_reach: Tensor  # [num_reqs, num_nodes] float64, see draft.prune


@dataclass(frozen=True, slots=True)
class DraftNoise:
    """What the draws of some requests depend on besides the distribution, as device tensors."""

    seed: Tensor  # [num_reqs] int64
    position: Tensor  # [num_reqs, block_length] int64, absolute
    temperature: Tensor  # [num_reqs] float64
    top_k: Tensor  # [num_reqs] int64, 0 keeps all
    top_p: Tensor  # [num_reqs] float64, 1 keeps all
    is_random: Tensor  # [num_reqs] bool, the policy `random`


@dataclass(frozen=True, slots=True)
class _Draws:
    """What each step would unmask, position by position, if the distribution stayed as it is."""

    token_ids: Tensor  # [num_reqs, num_draws, block_length, num_vocab_ranks] int64, best first
    log_probs: Tensor  # [num_reqs, num_draws, block_length, num_vocab_ranks] float64, of these tokens
    order: Tensor  # [num_reqs, num_draws, block_length] float64, the position rank follows it
    readiness: Tensor  # [num_reqs, num_draws, block_length] float64


def propose(
    graph: CompiledGraph, roots: Roots, draft_noise: DraftNoise | None, num_drafts: int | None = None
) -> Drafts:
    """Fill all nodes for every request and keep the best.

    A node that asks for more masked positions than there are, or leaves none, is invalid: nobody needs the forward of
    a finished canvas.

    Args:
        graph: of `num_nodes` nodes.
        roots: where the drafts start.
        draft_noise: None when all requests are greedy and none has the policy `random`.
        num_drafts: how many to keep; None keeps all.
    """
    draws = _greedy_draws(graph, roots) if draft_noise is None else _noisy_draws(graph, roots, draft_noise)
    is_greedy = None if draft_noise is None else draft_noise.temperature == 0
    weighing = None if graph.tokens is None else _Weighing(graph.tokens, roots, is_greedy)
    filled = unfilled(roots, graph.num_nodes)
    for filling in graph.at_once if draft_noise is None and weighing is None else graph.by_steps:
        _fill(filling, draws, filled, weighing)
    is_random = None if draft_noise is None else draft_noise.is_random
    ranking = rank_nodes(graph, filled, draws.readiness, is_random, roots.node_terms)
    return best_drafts(graph, filled, ranking, num_drafts)


def unfilled(roots: Roots, num_nodes: int) -> Filled:
    """Return the root, and nodes 1..num_nodes that add nothing to it yet."""
    shape = (len(roots.canvas), 1 + num_nodes)
    return Filled(
        canvas=roots.canvas[:, None].repeat(1, shape[1], 1),
        is_masked=roots.is_masked[:, None].repeat(1, shape[1], 1),
        is_valid=roots.canvas.new_ones(shape, dtype=torch.bool),
        log_prob=roots.canvas.new_zeros(shape, dtype=torch.float64),
    )


def best_drafts(graph: CompiledGraph, filled: Filled, ranking: Ranking, num_drafts: int | None = None) -> Drafts:
    """Return the nodes that are likeliest reached; `num_drafts` of them, None: all."""
    node = ranking.best_first[:, :num_drafts]
    return Drafts(
        canvas=filled.canvas.gather(1, node[..., None].expand(-1, -1, filled.canvas.shape[2])),
        is_valid=ranking.is_valid.gather(1, node - 1),
        node=node,
        depth=graph.depth[node],
        log_reach=ranking.log_reach.gather(1, node - 1),
    )


def likeliest_end(graph: CompiledGraph, roots: Roots, draft_noise: DraftNoise | None) -> Tensor:
    """Finish canvases by the likeliest token of each masked position; [num_reqs, block_length] int64.

    At a temperature that is the token which its draw will give, if positions become ready in the present order, or,
    where steps unmask as many as they like, if the next step unmasks all.

    Args:
        graph: says how positions become ready.
        roots: the canvases.
        draft_noise: as in `propose`.
    """
    token_ids = roots.candidates.token_ids
    if draft_noise is None:
        return torch.where(roots.is_masked, token_ids[..., 0], roots.canvas)
    masked_then = roots.is_masked.sum(1)[:, None, None]
    if graph.is_one_by_one:
        ready = graph.readiness.log_odds(roots.candidates.log_probs[..., 0], roots.is_new, roots.terms)
        order = ready.masked_fill(~roots.is_masked, -torch.inf).argsort(dim=-1, descending=True, stable=True)
        masked_then = masked_then - order.argsort(-1)[:, None]
    drawn = drawn_tokens(roots.candidates, draft_noise, masked_then[:, 0])
    return torch.where(roots.is_masked, drawn, roots.canvas)


def drawn_tokens(candidates: Candidates, draft_noise: DraftNoise, masked_then: Tensor) -> Tensor:
    """Return the token of each position that its draw will give, of the candidates; [num_reqs, block_length] int64.

    Args:
        candidates, draft_noise: of the requests.
        masked_then: [num_reqs, block_length or 1] int64, how many positions are masked when it is drawn.
    """
    _, scores = _noisy_scores(candidates, draft_noise, masked_then[:, None])
    best = scores[:, 0].argsort(dim=-1, descending=True, stable=True)[..., :1]
    return candidates.token_ids.gather(-1, best).squeeze(-1)


def _greedy_draws(graph: CompiledGraph, roots: Roots) -> _Draws:
    """Draw the same at each step."""
    times, num_ranks = len(graph.num_unmasked), graph.num_vocab_ranks
    token_ids = roots.candidates.token_ids[:, None].expand(-1, times, -1, -1)
    log_probs = roots.candidates.log_probs[:, None].expand(-1, times, -1, -1)
    readiness = graph.readiness.log_odds(log_probs[..., 0], roots.is_new[:, None], roots.node_terms)
    return _Draws(token_ids[..., :num_ranks], log_probs[..., :num_ranks], readiness, readiness)


def _noisy_draws(graph: CompiledGraph, roots: Roots, draft_noise: DraftNoise) -> _Draws:
    """Order the candidates by their scores when so many positions are masked."""
    num_masked = roots.is_masked.sum(1)
    masked_then = num_masked[:, None, None] - graph.num_unmasked[:, None]  # [num_reqs, num_draws, 1]
    keys, scores = _noisy_scores(roots.candidates, draft_noise, masked_then)
    best = scores.argsort(dim=-1, descending=True, stable=True)[..., : graph.num_vocab_ranks]
    token_ids = roots.candidates.token_ids[:, None].expand_as(scores).gather(-1, best)
    log_probs = roots.candidates.log_probs[:, None].expand_as(scores).gather(-1, best)
    readiness = graph.readiness.log_odds(log_probs[..., 0], roots.is_new[:, None], roots.node_terms)
    uniform = noise.uniform(keys, noise.STREAM)
    order = torch.where(draft_noise.is_random[:, None, None], uniform, readiness)
    return _Draws(token_ids, log_probs, order, readiness)


def _noisy_scores(candidates: Candidates, draft_noise: DraftNoise, masked_then: Tensor) -> tuple[Tensor, Tensor]:
    """Score the candidates by Gumbel-max as `ops.vocab_stats` will when so many positions are masked.

    top_p sees the candidates alone, so it may keep one that the decoder drops.

    Args:
        candidates, draft_noise: of the requests.
        masked_then: [num_reqs, num_draws, block_length or 1] int64, positions.

    Returns: the noise streams [num_reqs, num_draws, block_length] int64, and the scores [num_reqs, num_draws,
        block_length, num_candidates] float64.
    """
    keys = noise.stream_keys(draft_noise.seed[:, None, None], draft_noise.position[:, None], masked_then)
    ids, log_probs = candidates.token_ids[:, None], candidates.log_probs[:, None]
    temperature = draft_noise.temperature[:, None, None, None]
    rank = torch.arange(ids.shape[-1], device=ids.device)
    top_k = draft_noise.top_k[:, None, None, None]
    tempered = (log_probs / temperature.clamp(min=1e-9)).masked_fill((top_k > 0) & (rank >= top_k), -torch.inf)
    mass = tempered.softmax(-1)
    is_out = (mass == 0) | (mass.cumsum(-1) - mass >= draft_noise.top_p[:, None, None, None])
    scores = log_probs + temperature * noise.gumbel(keys[..., None], ids)
    return keys, scores.masked_fill(is_out & (rank > 0) & (temperature > 0), -torch.inf)


def neighbours(new: Tensor, position: Tensor) -> Tensor:
    """Return the new tokens beside positions.

    Args:
        new: [..., block_length] int64, tokens that are new, and NONE.
        position: [..., num_positions] int64.

    Returns: [..., num_positions, len(OFFSETS)] int64.
    """
    widest = max(OFFSETS)
    padded = pad(new, (widest, widest), value=NONE)
    return torch.stack([padded.gather(-1, position + widest + offset) for offset in OFFSETS], -1)


@dataclass(frozen=True, slots=True)
class _Weighing:
    """Chooses tokens by token weights."""

    weights: TokenWeights
    roots: Roots
    is_greedy: Tensor | None  # [num_reqs] bool, whose tokens; None: all requests'

    def choose(
        self, filling: Filling, filled: Filled, position: Tensor, drawn: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the tokens that nodes put at positions, and their log-probabilities among the candidates.

        Args:
            filling: the nodes.
            filled: their origins.
            position: [num_reqs, num_filled, max_pairs] int64.
            drawn: tokens int64 and log-probabilities float64 of the other requests, shaped as `position`.
        """
        roots, canvas = self.roots, filled.canvas[:, filling.origin]
        is_new = roots.is_new[:, None] | (roots.is_masked[:, None] & ~filled.is_masked[:, filling.origin])
        beside = neighbours(canvas.masked_fill(~is_new, NONE), position)
        request = torch.arange(len(canvas), device=canvas.device)[:, None, None]
        token_ids, log_probs = (
            each[request, position] for each in (roots.candidates.token_ids, roots.candidates.log_probs)
        )
        scores = self.weights.scores(token_ids, log_probs, beside)
        best = scores.argsort(dim=-1, descending=True, stable=True)
        chosen = best.gather(-1, filling.vocab_rank.expand_as(position)[..., None])
        tokens, chances = (each.gather(-1, chosen)[..., 0] for each in (token_ids, scores.log_softmax(-1)))
        if self.is_greedy is None:
            return tokens, chances
        is_mine = self.is_greedy[:, None, None]
        return torch.where(is_mine, tokens, drawn[0]), torch.where(is_mine, chances, drawn[1])


def _fill(filling: Filling, draws: _Draws, filled: Filled, weighing: _Weighing | None) -> None:
    """Fill some nodes from their origins, in place."""
    is_open = filled.is_masked[:, filling.origin]
    ordered = draws.order[:, filling.draw].masked_fill(~is_open, -torch.inf)
    order = ordered.argsort(dim=-1, descending=True, stable=True)
    rank = filling.position_rank.expand(len(order), -1, -1).clamp(max=order.shape[-1] - 1)
    position = order.gather(-1, rank)  # [num_reqs, num_filled, max_pairs]
    request = torch.arange(len(order), device=order.device)[:, None, None]
    draw, vocab_rank = filling.draw[:, None], filling.vocab_rank
    token_ids = draws.token_ids[request, draw, position, vocab_rank]
    log_probs = draws.log_probs[request, draw, position, vocab_rank]
    if weighing is not None:
        token_ids, log_probs = weighing.choose(filling, filled, position, (token_ids, log_probs))
    fits = (filling.position_rank < is_open.sum(-1, keepdim=True)) | ~filling.is_pair
    # A place that stands for no pair writes to a column that is cut off.
    column = position.masked_fill(~filling.is_pair, order.shape[-1])
    padded = pad(filled.canvas[:, filling.origin], (0, 1))
    filled.canvas[:, filling.node] = padded.scatter(-1, column, token_ids)[..., :-1]
    filled.is_masked[:, filling.node] = pad(is_open, (0, 1)).scatter(-1, column, value=False)[..., :-1]
    filled.is_valid[:, filling.node] = filled.is_valid[:, filling.origin] & fits.all(-1)
    added = log_probs.masked_fill(~filling.is_pair, 0.0).sum(-1)
    filled.log_prob[:, filling.node] = filled.log_prob[:, filling.origin] + added
