"""Train an order ranker on traces: gradient descent on the likelihood that `fit` maximises for the readiness."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vllm_dllm.calibrate.fit import STEPS_AHEAD
from vllm_dllm.calibrate.trace import PromptTrace
from vllm_dllm.draft.graph import MAX_CANDIDATES
from vllm_dllm.draft.prune import log_choices
from vllm_dllm.draft.ranker import OrderRanker, root_features
from vllm_dllm.draft.readiness import Readiness

EPOCHS = 16
BATCH_SIZE = 128
LEARNING_RATE = 4e-3


@dataclass(frozen=True, slots=True)
class Examples:
    """Roots, and which positions the `STEPS_AHEAD` steps behind each unmask.

    Attributes:
        features: [num_roots, block_length, NUM_FEATURES] float32.
        log_confidence: [num_roots, block_length] float64.
        is_new: [num_roots, block_length] bool, unmasked by the step that made the root.
        is_masked: [num_roots, 1 + STEPS_AHEAD, block_length] bool, in the root and behind each of these steps; no steps
            are left behind the block's end.
    """

    features: Tensor
    log_confidence: Tensor
    is_new: Tensor
    is_masked: Tensor

    def pick(self, index: Tensor) -> "Examples":
        """Return some of the roots."""
        return Examples(self.features[index], self.log_confidence[index], self.is_new[index], self.is_masked[index])


def make_examples(traces: Sequence[PromptTrace], mask_token_id: int) -> Examples | None:
    """Read examples from traces; None where none of their blocks has two steps."""
    parts = []
    for block in (block for trace in traces for block in trace.blocks if block.num_steps > 1):
        is_masked = torch.from_numpy(block.canvas == mask_token_id)
        num_roots = block.num_steps - 1
        log_probs = torch.from_numpy(block.log_probs[:-1, :, :MAX_CANDIDATES])
        is_new = is_masked[:num_roots] & ~is_masked[1:-1]
        ahead = np.minimum(np.arange(num_roots)[:, None] + 1 + np.arange(1 + STEPS_AHEAD), block.num_steps)
        features = root_features(log_probs, is_masked[1:-1], is_new)
        parts.append((features, log_probs[..., 0], is_new, is_masked[torch.from_numpy(ahead)]))
    return Examples(*map(torch.cat, zip(*parts, strict=True))) if parts else None


def loss(examples: Examples, readiness: Readiness, ranker: OrderRanker | None, *, is_one_by_one: bool) -> Tensor:
    """Return minus the mean logarithm of the probability of the steps behind the roots.

    Args:
        examples: the roots.
        readiness: what the ranker adds to.
        ranker: None: readiness alone.
        is_one_by_one: as `draft.prune.log_choices`.
    """
    terms = None if ranker is None else ranker(examples.features).double()[:, None]
    root, before, after = examples.is_masked[:, :1], examples.is_masked[:, :-1], examples.is_masked[:, 1:]
    is_new = examples.is_new[:, None] | (root & ~before)
    ready = readiness.log_odds(examples.log_confidence[:, None].expand(is_new.shape), is_new, terms)
    is_step = before.any(-1)
    # Of a step that is none, any position may be asked: it counts nothing.
    log_z = log_choices(ready, before | ~is_step[..., None], is_one_by_one=is_one_by_one)
    log_step = ready.masked_fill(~(before & ~after), 0.0).sum(-1) - log_z
    return -log_step[is_step].mean()


def next_share(examples: Examples, readiness: Readiness, ranker: OrderRanker | None) -> float:
    """Return at which share of the roots the readiest position is among those that come next."""
    terms = None if ranker is None else ranker(examples.features).double()
    root, after = examples.is_masked[:, 0], examples.is_masked[:, 1]
    ready = readiness.log_odds(examples.log_confidence, examples.is_new, terms).masked_fill(~root, -torch.inf)
    return float((root & ~after).gather(1, ready.argmax(1, keepdim=True)).double().mean())


def train_ranker(
    examples: Examples,
    readiness: Readiness,
    *,
    is_one_by_one: bool,
    seed: int,
    on_epoch: Callable[[], object] = lambda: None,
) -> OrderRanker:
    """Return a ranker.

    Args:
        examples: to train on.
        readiness: fitted to the same traces, what the ranker adds to.
        is_one_by_one: whether every step unmasks one position.
        seed: of weights and order.
        on_epoch: called after each of `EPOCHS`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ranker, count = OrderRanker(), len(examples.features)
        optimizer = torch.optim.AdamW(ranker.parameters(), weight_decay=0.02)
        num_steps = EPOCHS * -(-count // BATCH_SIZE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=num_steps)
        for _ in range(EPOCHS):
            for index in torch.randperm(count).split(BATCH_SIZE):
                optimizer.zero_grad()
                loss(examples.pick(index), readiness, ranker, is_one_by_one=is_one_by_one).backward()
                torch.nn.utils.clip_grad_norm_(ranker.parameters(), 1.0)
                optimizer.step()
                schedule.step()
            on_epoch()
    return ranker.eval()
