"""Spiffy, as published, on top of `reference.decode`: the speculative half of the oracle.

Spiffy (arXiv:2509.18085v4) Algorithm 1, sec. 4.1-4.2 and 4.4.4, for block decoding under KV policies that freeze what
a block sees, and for block-causal models, where it is exact: that depends on nothing of the block while it is
denoised. Batch of one, one canvas per forward of the model; a *call* is what an engine would do in one forward: the
root and its drafts. A block-causal model's first call of a block has no drafts, since no distribution of that block is
known; storing the block before it is part of that call and counts nothing.

A block-causal model's calls with at least `MIN_BUDGET` drafts look ahead (ours): in place of the last two they evaluate
the likeliest end of the block, and the next block, all masked, under that end. If the block ends so in this call, its
first step is decided by what the call computed. That counts as one draft.

Where the paper leaves open: drafts extend the canvas that the last distribution led to, in the ranks of that
distribution; a draft is accepted when it *is* the next canvas, whatever edge led to it; at a temperature each step of
a draft draws with the noise that the decoder will use then; `credit` decides a draft only where each token with credit
by then had some when the call began, or is among the draft's `MAX_CANDIDATES` likeliest. Other than in the paper,
position ranks and pruning go by calibrated readiness (`draft.prune`), and at temperature 0 vocab ranks go by token
weights, where a graph has some (`draft.token_weights`): then, too, a node is filled step by step.
"""

import math
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from typing import cast

import torch
from torch import Tensor

from vllm_dllm.draft.graph import MAX_CANDIDATES, DraftGraph, Formula
from vllm_dllm.draft.look_ahead import MAX_BLOCK_LENGTH, MIN_BUDGET, NUM_NODES
from vllm_dllm.draft.token_weights import LEAST_LOG_PROB, OFFSETS
from vllm_dllm.noise import STREAM, gumbel, stream_keys, uniform
from vllm_dllm.reference.block_causal import decoded_region, store_prompt
from vllm_dllm.reference.context import Frozen, StoredBlocks
from vllm_dllm.reference.credit import Credits
from vllm_dllm.reference.decode import KvPolicy, Model, Predictor, steps_per_block
from vllm_dllm.reference.ends import NO_ENDS, Ends
from vllm_dllm.reference.policy import LLADA, Block, Rules, UnmaskPolicy, unmask
from vllm_dllm.reference.qwen import Qwen
from vllm_dllm.reference.sampling import Sampling, kept_tokens, remove_tokens

Canvas = tuple[int, ...]
_DUAL = KvPolicy("dual")


@dataclass(frozen=True, slots=True)
class SpiffyGeneration:
    """What a call of `generate` did."""

    tokens: Tensor  # [gen_length] int64
    nfe: int  # calls, refreshes included
    nfe_refresh: int
    num_proposed: int  # drafts evaluated, look-aheads among them
    num_accepted: int  # of them


@dataclass(slots=True)
class _Calls:
    """What the calls did so far."""

    nfe: int = 0
    nfe_refresh: int = 0
    num_proposed: int = 0
    num_accepted: int = 0


@dataclass(frozen=True, slots=True)
class _Decoder:
    """One block of one request."""

    graph: DraftGraph
    num_drafts: int  # most per call
    looks_ahead: bool
    block: Block
    context: Frozen | StoredBlocks
    ends: Ends
    answer: Tensor  # [len] int64, before the block

    @property
    def mask_token_id(self) -> int:
        return self.context.model.config.mask_token_id

    @property
    def weighs_tokens(self) -> bool:
        """Whether token weights rank the tokens; at a temperature the noise does."""
        return self.graph.tokens is not None and self.block.sampling.temperature == 0

    def is_masked(self, canvas: Canvas) -> Tensor:
        return torch.tensor(canvas) == self.mask_token_id

    def next_canvas(self, canvas: Canvas, logits: Tensor) -> Canvas:
        """Take one step of the decoder: logits is [block_length, vocab]."""
        chosen, tokens = unmask(logits, self.is_masked(canvas), first=self.block.begin, block=self.block)
        return tuple(torch.tensor(canvas).index_put((chosen,), tokens).tolist())

    def finish(self, canvas: Canvas, logits: Tensor | None, calls: _Calls) -> tuple[Canvas, bool]:
        """Take all steps from a canvas on, whose logits an earlier call may have computed.

        Returns: the finished canvas, and whether the last call foresaw it.
        """
        before: Canvas | None = None
        if logits is not None:
            before, canvas = canvas, self.next_canvas(canvas, logits)
        end: Canvas | None = None
        while self.is_masked(canvas).any() and not self.is_over(canvas):
            drafts: list[Canvas] = []
            may_draft, is_refresh = self.context.begin_call()
            if may_draft and before is not None and logits is not None:
                drafts = self.drafts(canvas, before, logits)
                end = self.end(canvas, before, logits) if self.looks_ahead else None
            evaluated = {
                node: self.context.predict(torch.tensor(node), self.block.begin) for node in [*reversed(drafts), canvas]
            }
            calls.nfe += 1
            calls.nfe_refresh += is_refresh
            calls.num_proposed += len(drafts) + (end is not None)
            calls.num_accepted -= 1  # the root is no draft
            asked = deepcopy(self.block.credits)
            while canvas in evaluated and self.knows(canvas, evaluated[canvas], asked):
                before, logits = canvas, evaluated[canvas]
                canvas = self.next_canvas(canvas, logits)
                calls.num_accepted += 1
        return canvas, canvas == end

    def is_over(self, canvas: Canvas) -> bool:
        """Tell whether the answer's end is in a canvas, and known."""
        own = torch.tensor(canvas[-self.block.num_masked :])
        answer = torch.cat([self.answer, own])
        is_masked = torch.arange(len(answer)) >= len(self.answer)
        return self.ends.reached(answer, is_masked & (answer == self.mask_token_id))

    def knows(self, canvas: Canvas, logits: Tensor, asked: Credits) -> bool:
        """Say whether a call computed the logit of each token that has credit by now.

        Args:
            canvas: one of the call's.
            logits: [block_length, vocab], of it.
            asked: the credits when the call began.
        """
        top = remove_tokens(logits, self.block.sampling.forbidden_ids).topk(min(MAX_CANDIDATES, logits.shape[-1]))
        return all(
            self.block.credits.tokens(self.block.begin + i) <= asked.tokens(self.block.begin + i) | set(ids.tolist())
            for i, ids in enumerate(top.indices)
            if canvas[i] == self.mask_token_id
        )

    def end(self, root: Canvas, before: Canvas, logits: Tensor) -> Canvas:
        """Guess how the block ends: with the likeliest tokens, or those that the draws would give.

        Draws with the noise of the step in which a position has its turn, in the order of readiness, or, where steps
        unmask as many as they like, with that of the next step.
        """
        log_probs = remove_tokens(logits.double(), self.block.sampling.forbidden_ids).log_softmax(-1)
        is_masked = self.is_masked(root)
        is_new = self.is_masked(before) & ~is_masked
        ready = self.graph.readiness.log_odds(log_probs.max(-1).values, is_new).masked_fill(~is_masked, -torch.inf)
        canvas = list(root)
        num_masked = int(is_masked.sum())
        for turn, position in enumerate(ready.sort(descending=True, stable=True).indices[:num_masked].tolist()):
            masked_then = num_masked - turn if self.graph.tokens_per_step == 1 else num_masked
            ranked, _, _ = self._draw(log_probs, masked_then)
            canvas[position] = int(ranked[position, 0])
        return tuple(canvas)

    def drafts(self, root: Canvas, before: Canvas, logits: Tensor) -> list[Canvas]:
        """Guess canvases that follow the root, likeliest first, from the logits that led to it from `before`."""
        log_probs = remove_tokens(logits.double(), self.block.sampling.forbidden_ids).log_softmax(-1)
        is_new = self.is_masked(before) & ~self.is_masked(root)
        is_step_by_step = (
            self.block.sampling.temperature > 0 or self.block.policy.name == "random" or self.weighs_tokens
        )
        formulas: list[Formula] = [(), *self.graph.formulas]
        canvases: list[Canvas | None] = [root]
        # Of each node: log probability of being reached; least score on the way to it, on which the root is not.
        scores, worst = [0.0], [math.inf]
        for number, parents in enumerate(self.graph.parents, start=1):
            origin = parents[0] if is_step_by_step else 0
            node = self._extend(canvases[origin], root, formulas[origin], formulas[number], log_probs, is_new)
            canvases.append(node if node is not None and self.is_masked(node).any() else None)
            parent = canvases[parents[0]]
            if node is None or parent is None:
                scores.append(-torch.inf)
            else:
                scores.append(scores[parents[0]] + self._log_step(parent, node, root, log_probs, is_new))
            worst.append(min(worst[parents[0]], scores[-1] + self.graph.log_corrections[number - 1]))
        found = [m for m in range(1, len(canvases)) if canvases[m] is not None]
        return [canvas for m in sorted(found, key=lambda m: (-worst[m], m)) if (canvas := canvases[m])][
            : self.num_drafts
        ]

    def _extend(
        self, origin: Canvas | None, root: Canvas, old: Formula, new: Formula, log_probs: Tensor, is_new: Tensor
    ) -> Canvas | None:
        """Add to a node's canvas, of formula `old`, what `new` has more; None where positions do not suffice."""
        if origin is None:
            return None
        is_masked = self.is_masked(origin)
        ranked, log_confidence, keys = self._draw(log_probs, int(is_masked.sum()))
        if self.weighs_tokens:
            ranked, _ = self._weigh(origin, root, log_probs, is_new)
        order = self.graph.readiness.log_odds(log_confidence, is_new)
        if self.block.policy.name == "random":
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
        if self.weighs_tokens:
            ids, chances = self._weigh(parent, root, log_probs, is_new)
            log_tokens = sum(float(chances[x][ids[x] == node[x]]) for x in added.tolist())
        if self.block.policy.name == "random":  # the positions are known for certain
            return log_tokens
        _, log_confidence, _ = self._draw(log_probs, int(is_open.sum()))
        is_newer = is_new | (self.is_masked(root) & ~is_open)
        ready = self.graph.readiness.log_odds(log_confidence, is_newer)
        if self.graph.tokens_per_step == 1:
            log_z = ready[is_open].logsumexp(0)
        else:
            log_z = torch.log(torch.expm1(torch.nn.functional.softplus(ready[is_open]).sum()))
        return log_tokens + float(ready[added].sum() - log_z)

    def _weigh(self, canvas: Canvas, root: Canvas, log_probs: Tensor, is_new: Tensor) -> tuple[Tensor, Tensor]:
        """Rank the tokens of each position by token weights, for a step from a canvas that follows the root.

        Returns: token ids best first, and the logarithm of their probabilities, [block_length, MAX_CANDIDATES] each.
        """
        weights = self.graph.tokens
        assert weights is not None, "weighs_tokens says so"
        is_newer = is_new | (self.is_masked(root) & ~self.is_masked(canvas))
        top, ids = log_probs.topk(min(MAX_CANDIDATES, log_probs.shape[-1]))
        scores = []
        for x in range(len(canvas)):
            places = [x + offset for offset in OFFSETS]
            beside = [canvas[y] if 0 <= y < len(canvas) and is_newer[y] else None for y in places]
            slope = weights.slope + (0.0 if beside[:2] == [None, None] else weights.slope_beside_new)
            same = [
                sum(weight for weight, other in zip(weights.same, beside, strict=True) if other == token)
                for token in ids[x].masked_fill(top[x] == -math.inf, -1).tolist()  # an impossible one is no token
            ]
            found = [slope * max(p, LEAST_LOG_PROB) + more for p, more in zip(top[x].tolist(), same, strict=True)]
            scores.append(torch.tensor(found, dtype=torch.float64))
        order = torch.stack(scores).argsort(dim=-1, descending=True, stable=True)
        return ids.gather(-1, order), torch.stack(scores).log_softmax(-1).gather(-1, order)

    def _draw(self, log_probs: Tensor, num_masked: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rank the tokens of each position for the step that finds `num_masked` positions masked.

        Returns: token ids [block_length, MAX_CANDIDATES] best first, the log probability of the first of them
            [block_length], and the noise streams [block_length].
        """
        top, ids = log_probs.topk(min(MAX_CANDIDATES, log_probs.shape[-1]))
        position = self.block.begin + torch.arange(len(top))
        sampling = self.block.sampling
        keys = stream_keys(torch.full_like(position, sampling.seed), position, torch.full_like(position, num_masked))
        scores = top
        if sampling.temperature > 0:
            noisy = top + sampling.temperature * gumbel(keys[:, None], ids)
            scores = noisy.masked_fill(~kept_tokens(top, sampling), -torch.inf)
        ranked = ids.gather(-1, scores.argsort(dim=-1, descending=True, stable=True))
        return ranked, log_probs.gather(-1, ranked[:, :1]).squeeze(-1), keys


@torch.no_grad()
def generate(  # noqa: PLR0913 - the decoders' arguments, and how to draft
    model: Model,
    prompt: Tensor,
    *,
    graph: DraftGraph,
    budget: int,
    gen_length: int,
    block_length: int,
    policy: UnmaskPolicy,
    sampling: Sampling,
    rules: Rules = LLADA,
    ends: Ends = NO_ENDS,
    horizon: int | None = None,
    kv: KvPolicy = _DUAL,
) -> SpiffyGeneration:
    """Generate what `decode.generate` does under such a KV policy, or `block_causal.generate`, in fewer calls.

    Args:
        model, prompt: the model; [prompt_len] int64.
        graph: the draft graph.
        budget: most drafts per call, the look-ahead counted as `NUM_NODES`; 0 is the decoder itself.
        gen_length, block_length: as the decoder's.
        policy, sampling: the unmasking policy; how tokens are chosen. A guided call has two forwards, and counts once.
        rules, ends, horizon: as the decoder's.
        kv: `dual` (with `refresh_every` 1 or none), `freecache` or `vicinity`; of a block-causal model anything.
    """
    prompt_len = len(prompt)
    context: Frozen | StoredBlocks
    if rules.attention == "block_causal":
        steps = policy.steps or block_length
        first_begin, seq_len = decoded_region(prompt_len, gen_length, block_length)
        context = StoredBlocks(model, store_prompt(cast(Qwen, model), prompt, block_length), first_begin)
    else:
        steps = steps_per_block(gen_length, block_length, policy.steps)
        first_begin, seq_len = prompt_len, prompt_len + gen_length
        rules = replace(rules, unmasks_first_alone=rules.unmasks_first_alone and kv.unmasks_first_alone)
        predictor = Predictor(model, torch.arange(seq_len) < prompt_len, sampling.cfg_scale, rules.logit_shift)
        context = Frozen(predictor, kv, horizon)
    tokens = torch.cat((prompt, prompt.new_full((seq_len - prompt_len,), model.config.mask_token_id)))
    has_look_ahead = rules.attention == "block_causal" and budget >= MIN_BUDGET and block_length <= MAX_BLOCK_LENGTH
    num_drafts = budget - NUM_NODES * has_look_ahead
    is_foreseen = False
    calls = _Calls()
    for begin in range(first_begin, seq_len, block_length):
        end = begin + block_length
        num_masked = end - max(begin, prompt_len)
        block = Block(begin, block_length, num_masked, steps, policy, sampling, rules, model.config.eos_token_id)
        logits = context.begin_block(tokens, begin, end)
        if logits is not None:
            calls.nfe, calls.nfe_refresh = calls.nfe + 1, calls.nfe_refresh + 1
        elif is_foreseen:  # the last call computed this
            logits = context.predict(tokens[begin:end], begin)
        looks_ahead = has_look_ahead and end < seq_len
        decoder = _Decoder(graph, num_drafts, looks_ahead, block, context, ends, tokens[prompt_len:begin])
        canvas, is_foreseen = decoder.finish(tuple(tokens[begin:end].tolist()), logits, calls)
        calls.num_accepted += is_foreseen
        tokens[begin:end] = torch.tensor(canvas)
        if decoder.is_over(canvas):
            break
    return SpiffyGeneration(tokens[prompt_len:], **asdict(calls))
