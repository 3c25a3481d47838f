"""Spiffy, as published, on top of `reference.decode`: the speculative half of the oracle.

Spiffy (arXiv:2509.18085v4) Algorithm 1, sec. 4.1-4.2 and 4.4.4, for block decoding under the dual cache, where it is
exact: nothing outside a block depends on the block while it is denoised. Batch of one, one canvas per forward of the
model; a *call* is what an engine would do in one forward: the root and its drafts.

Where the paper leaves open: drafts extend the canvas that the last distribution led to, in the ranks of that
distribution; a draft is accepted when it *is* the next canvas, whatever edge led to it; at a temperature each step of
a draft draws with the noise that the decoder will use then. Other than in the paper, position ranks and pruning go by
calibrated readiness (`draft.prune`).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_dllm.draft.graph import MAX_CANDIDATES, DraftGraph, Formula
from vllm_dllm.noise import STREAM, gumbel, stream_keys, uniform
from vllm_dllm.reference.decode import Sampling, UnmaskPolicy, filter_logits, static_counts, unmask
from vllm_dllm.reference.layers import LayerKv
from vllm_dllm.reference.model import LLaDA

Canvas = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SpiffyGeneration:
    """What a call of `generate` did."""

    tokens: Tensor  # [gen_length] int64
    nfe: int  # calls, refreshes included
    nfe_refresh: int
    num_proposed: int  # drafts evaluated
    num_accepted: int  # of them


@dataclass(frozen=True, slots=True)
class _Decoder:
    """One block of one request."""

    model: LLaDA
    graph: DraftGraph
    budget: int  # most drafts per call
    begin: int  # absolute position of the block
    schedule: Mapping[int, int]  # static policies: positions to unmask by positions masked
    policy: UnmaskPolicy
    sampling: Sampling

    def is_masked(self, canvas: Canvas) -> Tensor:
        return torch.tensor(canvas) == self.model.config.mask_token_id

    def next_canvas(self, canvas: Canvas, logits: Tensor) -> Canvas:
        """Take one step of the decoder: logits is [block_length, vocab]."""
        is_masked = self.is_masked(canvas)
        chosen, tokens = unmask(
            logits,
            is_masked,
            first=self.begin,
            static_count=self.schedule.get(int(is_masked.sum()), 1),
            policy=self.policy,
            sampling=self.sampling,
            eos_id=self.model.config.eos_token_id,
        )
        return tuple(torch.tensor(canvas).index_put((chosen,), tokens).tolist())

    def drafts(self, root: Canvas, before: Canvas, logits: Tensor) -> list[Canvas]:
        """Guess canvases that follow the root, likeliest first, from the logits that led to it from `before`."""
        forbidden = torch.tensor(self.sampling.forbidden_ids, dtype=torch.int64)
        log_probs = logits.double().index_fill(-1, forbidden, -torch.inf).log_softmax(-1)
        is_new = self.is_masked(before) & ~self.is_masked(root)
        is_step_by_step = self.sampling.temperature > 0 or self.policy.name == "random"
        formulas: list[Formula] = [(), *self.graph.formulas]
        canvases: list[Canvas | None] = [root]
        scores, worst = [0.0], [0.0]  # of each node: log probability of being reached; least score on the way to it
        for number, parents in enumerate(self.graph.parents, start=1):
            origin = parents[0] if is_step_by_step else 0
            node = self._extend(canvases[origin], formulas[origin], formulas[number], log_probs, is_new)
            canvases.append(node if node is not None and self.is_masked(node).any() else None)
            parent = canvases[parents[0]]
            if node is None or parent is None:
                scores.append(-torch.inf)
            else:
                scores.append(scores[parents[0]] + self._log_step(parent, node, root, log_probs, is_new))
            worst.append(min(worst[parents[0]], scores[-1] + self.graph.log_corrections[number - 1]))
        found = [m for m in range(1, len(canvases)) if canvases[m] is not None]
        return [canvas for m in sorted(found, key=lambda m: (-worst[m], m)) if (canvas := canvases[m])][: self.budget]

    def _extend(
        self, origin: Canvas | None, old: Formula, new: Formula, log_probs: Tensor, is_new: Tensor
    ) -> Canvas | None:
        """Add to a node's canvas, of formula `old`, what `new` has more; None where positions do not suffice."""
        if origin is None:
            return None
        is_masked = self.is_masked(origin)
        ranked, log_confidence, keys = self._draw(log_probs, int(is_masked.sum()))
        order = self.graph.readiness.log_odds(log_confidence, is_new)
        if self.policy.name == "random":
            order = uniform(keys, STREAM)
        positions = order.masked_fill(~is_masked, -torch.inf).sort(descending=True, stable=True).indices
        canvas = list(origin)
        for position_rank, vocab_rank in new:
            if (position_rank, vocab_rank) in old:
                continue
            rank = position_rank - sum(taken < position_rank for taken, _ in old)
            if rank >= is_masked.sum():
                return None
            position = int(positions[rank])
            canvas[position] = int(ranked[position, vocab_rank])
        return tuple(canvas)

    def _log_step(self, parent: Canvas, node: Canvas, root: Canvas, log_probs: Tensor, is_new: Tensor) -> float:
        """Return the log probability of the step from a node's parent to it, by readiness and probability."""
        is_open = self.is_masked(parent)
        added = (is_open & ~self.is_masked(node)).nonzero().squeeze(-1)
        log_tokens = sum(float(log_probs[x, node[x]]) for x in added.tolist())
        if self.policy.name == "random":  # the positions are known for certain
            return log_tokens
        _, log_confidence, _ = self._draw(log_probs, int(is_open.sum()))
        is_newer = is_new | (self.is_masked(root) & ~is_open)
        ready = self.graph.readiness.log_odds(log_confidence, is_newer)
        if self.graph.tokens_per_step == 1:
            log_z = ready[is_open].logsumexp(0)
        else:
            log_z = torch.log(torch.expm1(torch.nn.functional.softplus(ready[is_open]).sum()))
        return log_tokens + float(ready[added].sum() - log_z)

    def _draw(self, log_probs: Tensor, num_masked: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rank the tokens of each position for the step that finds `num_masked` positions masked.

        Returns: token ids [block_length, MAX_CANDIDATES] best first, the log probability of the first of them
            [block_length], and the noise streams [block_length].
        """
        top, ids = log_probs.topk(min(MAX_CANDIDATES, log_probs.shape[-1]))
        position = self.begin + torch.arange(len(top))
        keys = stream_keys(
            torch.full_like(position, self.sampling.seed), position, torch.full_like(position, num_masked)
        )
        scores, temperature = top, self.sampling.temperature
        if temperature > 0:
            is_kept = filter_logits(top / temperature, self.sampling) > -torch.inf
            scores = (top + temperature * gumbel(keys[:, None], ids)).masked_fill(~is_kept, -torch.inf)
        ranked = ids.gather(-1, scores.argsort(dim=-1, descending=True, stable=True))
        return ranked, log_probs.gather(-1, ranked[:, :1]).squeeze(-1), keys


@torch.no_grad()
def generate(
    model: LLaDA,
    prompt: Tensor,
    *,
    graph: DraftGraph,
    budget: int,
    gen_length: int,
    block_length: int,
    policy: UnmaskPolicy,
    sampling: Sampling,
) -> SpiffyGeneration:
    """Generate what `reference.decode.generate` does under the dual cache, in fewer calls.

    Args:
        model: the model.
        prompt: [prompt_len] int64.
        graph: the draft graph.
        budget: most drafts per call; 0 is the decoder itself.
        gen_length: positions to generate, a multiple of `block_length`.
        block_length: positions per block.
        policy: the unmasking policy.
        sampling: how tokens are chosen; without guidance.
    """
    steps = block_length if policy.steps is None else policy.steps * block_length // gen_length
    schedule, left = {}, block_length
    for count in static_counts(block_length, steps):
        schedule[left] = count
        left -= count
    tokens = torch.cat((prompt, prompt.new_full((gen_length,), model.config.mask_token_id)))
    nfe = nfe_refresh = num_proposed = num_accepted = 0
    for begin in range(len(prompt), len(tokens), block_length):
        decoder = _Decoder(model, graph, budget, begin, schedule, policy, sampling)
        block = slice(begin, begin + block_length)
        # The refresh sees the block too, all masked: its own logits decide the first step.
        logits, kept = model.forward(tokens, 0, None)
        logits = logits[block]
        nfe, nfe_refresh = nfe + 1, nfe_refresh + 1
        before: Canvas = tuple(tokens[block].tolist())
        canvas = decoder.next_canvas(before, logits)
        while decoder.is_masked(canvas).any():
            drafts = decoder.drafts(canvas, before, logits)
            evaluated = {node: _forward(model, node, begin, kept) for node in [*reversed(drafts), canvas]}
            nfe, num_proposed = nfe + 1, num_proposed + len(drafts)
            num_accepted -= 1  # the root is no draft
            while canvas in evaluated:
                before, logits = canvas, evaluated[canvas]
                canvas = decoder.next_canvas(before, logits)
                num_accepted += 1
        tokens[block] = torch.tensor(canvas)
    return SpiffyGeneration(tokens[len(prompt) :], nfe, nfe_refresh, num_proposed, num_accepted)


def _forward(model: LLaDA, canvas: Canvas, begin: int, kept: list[LayerKv]) -> Tensor:
    """Predict a block under the K/V that the refresh kept of everything else; [block_length, vocab]."""
    return model.forward(torch.tensor(canvas), begin, kept)[0]
