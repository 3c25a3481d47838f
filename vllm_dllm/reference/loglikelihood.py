"""The likelihood of a continuation under a bidirectional masked-diffusion model, as published: a Monte-Carlo estimate.

Source: ML-GSAI/LLaDA `get_log_likelihood.py` and `eval_llada.py`, arXiv:2502.09992 sec. 2.4 and app. B.5. A sample
masks k of the continuation's L positions, and its loss is the sum of the cross-entropies there times L / k. The k of
the samples are spread evenly over 1..L. What is drawn is a function of what it is drawn for (`vllm_dllm.noise`) where
the published code draws from torch's generator; a batch of the published code is all samples here.
"""

from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from vllm_dllm.noise import STREAM, stream_keys, uniform
from vllm_dllm.reference.decode import Model, shift
from vllm_dllm.reference.policy import LLADA, Rules


@dataclass(frozen=True, slots=True)
class Likelihood:
    """What a call of `loglikelihood` found."""

    value: float  # nats
    samples: list[float]  # whose mean it is
    tokens: list[float]  # of each position, its part of the samples' losses: they add up to the value


def masks(num_samples: int, length: int, seed: int) -> list[list[int]]:
    """Draw which positions of a continuation each sample masks, ascending."""

    def number(position: int, sample: int) -> float:
        key = stream_keys(torch.tensor(seed), torch.tensor(position), torch.tensor(sample))
        return float(uniform(key, STREAM))

    first = 1 + int(number(length, 0) * length)
    drawn = []
    for sample in range(num_samples):
        count = (round(first + sample * (length / num_samples)) - 1) % length + 1
        order = sorted(range(length), key=lambda position: number(position, sample))
        drawn.append(sorted(order[:count]))
    return drawn


@torch.no_grad()
def losses(model: Model, prompt: Tensor, continuation: Tensor, masked: list[int], rules: Rules = LLADA) -> Tensor:
    """Return the log-probabilities of the masked positions' tokens, [num_masked] float64.

    Args:
        model, rules: of the family.
        prompt, continuation: [len] int64 each.
        masked: positions of the continuation.
    """
    tokens = torch.cat((prompt, continuation))
    positions = len(prompt) + torch.tensor(masked)
    noisy = tokens.index_fill(0, positions, model.config.mask_token_id)
    logits, _ = model.forward(noisy, 0, None)
    logits = shift(logits, logits[:1]) if rules.logit_shift else logits
    log_probs = logits[positions].double().log_softmax(-1)
    return log_probs.gather(-1, tokens[positions, None]).squeeze(-1)


def loglikelihood(
    model: Model, prompt: Tensor, continuation: Tensor, *, num_samples: int = 128, seed: int = 0, rules: Rules = LLADA
) -> Likelihood:
    """Estimate the log-likelihood of a continuation behind a prompt, [len] int64 each."""
    length, samples = len(continuation), []
    tokens = torch.zeros(length, dtype=torch.float64)
    for masked in masks(num_samples, length, seed):
        found = losses(model, prompt, continuation, masked, rules) * (length / len(masked))
        samples.append(float(found.sum()))
        tokens[masked] += found / num_samples
    return Likelihood(sum(samples) / num_samples, samples, tokens.tolist())


def exhaustive(model: Model, prompt: Tensor, continuation: Tensor, rules: Rules = LLADA) -> float:
    """Return what the estimate is of: the mean over k, and over all ways to mask k positions."""
    length, total = len(continuation), 0.0
    for count in range(1, length + 1):
        sets = [list(each) for each in combinations(range(length), count)]
        found = [float(losses(model, prompt, continuation, each, rules).sum()) for each in sets]
        total += sum(found) / len(found) * (length / count) / length
    return total
