"""Choose which nodes of a graph a step evaluates: those that are likeliest reached.

In place of Spiffy's geometric mean (arXiv:2509.18085v4 sec. 4.4.4), the probability that the decoder comes to a node's
canvas by the steps of its chain of first parents, as far as the root's distribution can tell. A step from p that
unmasks the positions D has the probability

    prod_{x in D} exp(u_p(x)) P(token of x)  /  Z_p

where u_p is the readiness with p's own positions counted as new, and Z_p sums over all choices the step has: one
position where each step unmasks one, else any set but the empty one. docs/calibration.md compares the two.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from vllm_dllm.draft.compile import CompiledGraph


@dataclass(frozen=True, slots=True)
class Filled:
    """The nodes of a graph, filled; node 0 is the root."""

    canvas: Tensor  # [num_reqs, 1 + num_nodes, block_length] int64
    is_masked: Tensor  # [num_reqs, 1 + num_nodes, block_length] bool
    is_valid: Tensor  # [num_reqs, 1 + num_nodes] bool
    log_prob: Tensor  # [num_reqs, 1 + num_nodes] float64, of the tokens that a node adds to the root


@dataclass(frozen=True, slots=True)
class Ranking:
    """What is known of nodes 1..num_nodes of each request."""

    is_valid: Tensor  # [num_reqs, num_nodes] bool, may be evaluated
    log_reach: Tensor  # [num_reqs, num_nodes] float64, probability of being reached, before correction
    best_first: Tensor  # [num_reqs, num_nodes] int64, node numbers; those that may not be evaluated come last


def log_choices(ready: Tensor, is_open: Tensor, *, is_one_by_one: bool) -> Tensor:
    """Return log Z_p: the logarithm of the sum of exp(readiness) over all choices that a step has.

    Args:
        ready: [..., block_length] float64, readiness.
        is_open: [..., block_length] bool, positions that the step may choose, at least one.
        is_one_by_one: whether it chooses one position, else any set but the empty one.
    """
    if is_one_by_one:
        return ready.masked_fill(~is_open, -torch.inf).logsumexp(-1)
    log_any_set = softplus(ready).masked_fill(~is_open, 0.0).sum(-1)
    return log_any_set + torch.log(-torch.expm1(-log_any_set))


def rank_nodes(
    graph: CompiledGraph,
    filled: Filled,
    readiness: Tensor,
    is_random: Tensor | None,
    terms: Tensor | None = None,
) -> Ranking:
    """Order the nodes of each request by how likely they are reached, each behind its chain of first parents.

    Args:
        graph: of `num_nodes` nodes.
        filled: its nodes.
        readiness: [num_reqs, num_draws, block_length] float64, with the root's own new positions.
        is_random: [num_reqs] bool, requests whose positions are known for certain; None: no one's.
        terms: [num_reqs, 1, block_length, 1 + 2 * REACH] float64, of `Readiness.near_new`.
    """
    is_valid = filled.is_valid[:, 1:] & filled.is_masked[:, 1:].any(2)
    is_open = filled.is_masked[:, graph.first_parent]
    new = filled.is_masked[:, :1] & ~is_open
    ready = readiness[:, graph.draw] + graph.readiness.near_new(new, terms)
    log_z = log_choices(ready, is_open, is_one_by_one=graph.is_one_by_one)
    added = is_open & ~filled.is_masked[:, 1:]
    log_step = ready.masked_fill(~added, 0.0).sum(2) - log_z
    if is_random is not None:
        log_step = log_step.masked_fill(is_random[:, None], 0.0)
    log_step = log_step.masked_fill(~is_valid, 0.0)
    log_reach = log_step @ graph.is_on_way.double().T + filled.log_prob[:, 1:]
    log_reach = log_reach.masked_fill(~is_valid, -torch.inf)
    score = log_reach + graph.log_correction
    worst_on_way = torch.where(graph.is_on_way, score[:, None], torch.inf).amin(2)
    return Ranking(is_valid, log_reach, 1 + worst_on_way.argsort(dim=1, descending=True, stable=True))
