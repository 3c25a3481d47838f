"""Block decoding of bidirectional masked-diffusion models, as published: the decoding half of the oracle.

One loop covers these decoders, which differ in values:

    LLaDA      `generate`: no cache
    Dream      `diffusion_generate`: rules `DREAM`, no cache, one block as long as the generation
    Fast-dLLM  `generate_with_prefix_cache` and `generate_with_dual_cache`, arXiv:2505.22618 sec. 3.2: KV policies
               `prefix` and `dual`
    FlashDLM   FreeCache, arXiv:2505.21467: KV policy `freecache`
    dKV-Cache  `generate` with `enable_cache` for LLaDA and `_sample` with cache type "decoded" and shift type "un" for
               Dream, arXiv:2505.15781: KV policy `dkv`; with cache type "pd" KV policy `dkv_pd`
    dInfer     `VicinityCacheDiffusionLLM`, arXiv:2510.08666: KV policy `vicinity`
    Fast-dLLM  on Dream (`generation_utils_block.py`): the same with rules `DREAM`, policy `entropy` or `threshold`

A step forwards the model and decides as `reference.policy` says. Additions of ours are marked "ours". Batch of one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from vllm_dllm.reference.constraint import Constraint
from vllm_dllm.reference.edits import Known
from vllm_dllm.reference.ends import NO_ENDS, Ends
from vllm_dllm.reference.layers import LayerKv
from vllm_dllm.reference.model import LLaDA
from vllm_dllm.reference.policy import LLADA, Block, Rules, UnmaskPolicy
from vllm_dllm.reference.qwen import Qwen
from vllm_dllm.reference.sampling import Sampling
from vllm_dllm.reference.step import decide, sequence_of, under

Model = LLaDA | Qwen


@dataclass(frozen=True, slots=True)
class KvPolicy:
    """Which keys and values a forward computes anew.

    `none`: those of the whole sequence, at every step. `prefix`: those from the block's begin on; `dual`: those of
    the block. The others are kept from the last refresh, a forward over the whole sequence that every block begins
    with. Ours: `refresh_every=n` also refreshes at each step of a block whose index n divides; 1 is `none`.

    `freecache`: those from the block's begin on, too, but nothing that lies before is ever refreshed. What a block
    leaves behind is what its successor's first step makes of it, a forward from the block that ended on. Under a logit
    shift all begins are one position earlier, at the row that predicts the block's first position.

    `dkv`: those from the block's begin on, but for tokens that were known before the step before, whose keys and
    values are kept as that step computed them; all at every step of a block that `refresh_every` (8) divides, and
    without a logit shift at the one behind the first. With one, a row counts for the position that it predicts, the
    last one for known.

    `dkv_pd`: the same, but where `dkv` computes all, the prompt's keys and values are kept from the request's first
    step. With a logit shift its last row, which predicts the reply's first position, is no part of them.

    `vicinity`: those of the block and of some positions before and behind it, kept as under `dual`. In the request's
    first block `warmup_steps` forwards over the whole sequence come first.
    """

    name: Literal["none", "prefix", "dual", "freecache", "vicinity", "dkv", "dkv_pd"] = "none"
    refresh_every: int | None = None
    prefix_look: int = 16
    after_look: int = 16
    warmup_steps: int = 4

    def __post_init__(self) -> None:
        """Raise ValueError for a refresh interval that has no meaning."""
        if self.refresh_every is not None and (self.name == "none" or self.refresh_every < 1):
            message = f"refresh_every is {self.refresh_every} with KV policy '{self.name}'; give n >= 1 with a cache."
            raise ValueError(message)

    @property
    def unmasks_first_alone(self) -> bool:
        """Whether Fast-dLLM's first step of a block applies, which unmasks its first position alone on Dream."""
        return self.name in ("prefix", "dual") and self.refresh_every != 1

    def delays(self, step: int, shift: int) -> bool:
        """Tell whether step `step` of a block, from 0, leaves keys and values of known tokens as they are."""
        return self.name in ("dkv", "dkv_pd") and step % (self.refresh_every or 8) > 0 and (step > 1 or bool(shift))

    def span(self, number: int, step: int, block: tuple[int, int], seq_len: int, shift: int) -> tuple[int, int, bool]:
        """Return which positions [first, last) a step forwards, and whether their keys and values are kept.

        Args:
            number: of the block in the request, from 0.
            step: of the block, from 0.
            block: positions [begin, end).
            seq_len: of the sequence.
            shift: 1 where a row predicts the next position, else 0.
        """
        begin, end = block
        if self.name == "freecache" and number > 0 and step == 0:
            return begin - (end - begin) - shift, seq_len, True
        if self.name == "freecache" and step > 0:
            return begin - shift, seq_len, False
        if self.name in ("dkv", "dkv_pd"):
            keeps_prompt = self.name == "dkv_pd" and (number, step) != (0, 0)
            refreshed = begin - number * (end - begin) - shift if keeps_prompt else 0
            return begin - shift if self.delays(step, shift) else refreshed, seq_len, True
        num_whole = 1 + self.warmup_steps if self.name == "vicinity" and number == 0 else 1
        is_refresh = step < num_whole if self.refresh_every is None else step % self.refresh_every == 0
        if self.name == "none" or is_refresh:
            return 0, seq_len, True
        if self.name == "vicinity":
            return max(0, begin - self.prefix_look), min(seq_len, end + self.after_look), False
        return begin, seq_len if self.name == "prefix" else end, False


_UNCACHED, _STATIC, _GREEDY = KvPolicy(), UnmaskPolicy(), Sampling()


@dataclass(frozen=True, slots=True)
class Generation:
    """What a call of `generate` did; guidance doubles both counts of forwards."""

    tokens: Tensor  # [gen_length] int64
    nfe: int  # forwards of the model
    nfe_refresh: int  # those of them whose keys and values were kept
    history: Tensor  # [num_steps, gen_length] int64: the generated region after each step
    nfe_commit: int = 0  # SDAR: further forwards that stored a finished block
    # [gen_length, vocab] float64, of what each token could have been in the step that unmasked it, see `step.decide`
    log_probs: Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass(slots=True)
class History:
    """What a generation did, step by step. A token that no step unmasked is certain: it was given."""

    prompt_len: int
    tokens: list[Tensor] = field(default_factory=list)  # [seq_len - prompt_len] int64 after each step
    _log_probs: dict[int, Tensor] = field(default_factory=dict)  # by position

    def add(self, tokens: Tensor, positions: Tensor, log_probs: Tensor) -> None:
        """Add a step that unmasked positions [n] int64 of tokens [seq_len], with log-probabilities [n, vocab]."""
        self.tokens.append(tokens[self.prompt_len :].clone())
        self._log_probs |= zip(positions.tolist(), log_probs, strict=True)

    def generation(self, tokens: Tensor, **counts: int) -> Generation:
        """Return what was done, of which `counts` say more: each step took a forward, if they do not say else."""
        answer = tokens[self.prompt_len :]
        history = torch.stack(self.tokens)[:, : len(answer)] if self.tokens else answer.new_empty(0, len(answer))
        counts = {"nfe": len(history), "nfe_refresh": 0} | counts
        return Generation(answer, history=history, log_probs=self._of(answer), **counts)

    def _of(self, answer: Tensor) -> Tensor:
        """Return the log-probabilities of an answer; [len(answer), vocab], as far as its ids where all was given."""
        vocab_size = max(map(len, self._log_probs.values()), default=int(answer.max()) + 1)
        rows = torch.full((len(answer), vocab_size), -torch.inf, dtype=torch.float64)
        for place, token in enumerate(answer.tolist()):
            unmasked = self._log_probs.get(self.prompt_len + place)
            rows[place, token] = 0.0
            rows[place] = rows[place] if unmasked is None else unmasked
        return rows


def shift(rows: Tensor, left_context: Tensor) -> Tensor:
    """Turn logits of rows, each of which predicts the next position, into those of the rows' own positions.

    Args:
        rows: [len, vocab].
        left_context: [1, vocab], of the row on their left.

    Returns: [len, vocab].
    """
    return torch.cat((left_context, rows[:-1]))


@dataclass(slots=True)
class Predictor:
    """Forwards spans of the sequence and keeps what refreshes computed."""

    model: Model
    is_prompt: Tensor  # [seq_len] bool
    cfg_scale: float
    logit_shift: bool
    kept: list[list[LayerKv] | None] = field(default_factory=lambda: [None, None])  # the sequence, its unguided twin
    before: Tensor | None = None  # [seq_len] bool, known before the step before; None: all is computed anew
    refreshed: Tensor = field(default_factory=lambda: torch.empty(0))  # [seq_len, vocab], predictions
    nfe: int = 0
    nfe_refresh: int = 0

    def logits(self, tokens: Tensor, first: int, last: int, *, keeps: bool) -> Tensor:
        """Predict positions [first, last) of tokens [seq_len]; returns [last - first, vocab], guided if asked.

        `keeps` says whether later forwards see the keys and values of this one.

        Under a logit shift nothing predicts position 0, which keeps its own row as published, and a span's first
        position is predicted by the last refresh. Fast-dLLM lets that position keep its own row, which is harmless
        where it is never masked any more.
        """
        rows = self._guided(tokens, first, last, keeps)
        if self.logit_shift:
            rows = shift(rows, rows[:1] if first == 0 else self.refreshed[first : first + 1])
        if last - first == len(tokens):
            self.refreshed = rows
        return rows

    def _guided(self, tokens: Tensor, first: int, last: int, keeps: bool) -> Tensor:
        logits = self._forward(0, tokens, first, last, keeps)
        if self.cfg_scale == 0:
            return logits
        masked = tokens.masked_fill(self.is_prompt[: len(tokens)], self.model.config.mask_token_id)
        unguided = self._forward(1, masked, first, last, keeps)
        return unguided + (self.cfg_scale + 1) * (logits - unguided)

    def _forward(self, twin: int, tokens: Tensor, first: int, last: int, keeps: bool) -> Tensor:
        stays = None if self.before is None else self.before.roll(-self.logit_shift)[first:last]
        is_anew = last - first == len(tokens) and stays is None
        logits, kv = self.model.forward(tokens[first:last], first, None if is_anew else self.kept[twin], stays=stays)
        self.nfe += 1
        if keeps:
            self.nfe_refresh += stays is None
            self.kept[twin] = kv
        return logits


def steps_per_block(gen_length: int, block_length: int, steps: int | None) -> int:
    """Divide a generation's steps among its blocks, as LLaDA and Fast-dLLM do; ValueError where they do not divide."""
    if gen_length % block_length:
        raise ValueError(f"gen_length is {gen_length}, no multiple of block_length {block_length}; round it up.")
    num_blocks = gen_length // block_length
    if steps is None:
        return block_length
    if steps % num_blocks or steps < 1:
        raise ValueError(f"steps is {steps} for {num_blocks} blocks; give a positive multiple of {num_blocks}.")
    return steps // num_blocks


def take_step(tokens: Tensor, is_masked: Tensor, logits: Tensor, first: int, block: Block, history: History) -> None:
    """Unmask what a step of a block decides, in place.

    Args:
        tokens: [seq_len] int64.
        is_masked: [seq_len] bool.
        logits: [len, vocab], of positions from `first` on that have the block among them.
        first: of them.
        block: of the sequence, whose end may cut it.
        history: of the generation; takes the step.
    """
    end = min(block.begin + block.length, len(tokens))
    is_open = is_masked.clone()
    is_open[: block.begin] = is_open[end:] = False
    known = Known(tokens[:end], is_masked[:end], history.prompt_len)
    chosen, chosen_tokens, log_probs = decide(known, logits, is_open[first : first + len(logits)], first, block)
    tokens[first + chosen] = chosen_tokens
    is_masked[first + chosen] = False
    history.add(tokens, first + chosen, log_probs)


@torch.no_grad()
def generate(  # noqa: PLR0913 - the decoders' arguments
    model: Model,
    prompt: Tensor,
    *,
    gen_length: int,
    block_length: int,
    kv: KvPolicy = _UNCACHED,
    policy: UnmaskPolicy = _STATIC,
    sampling: Sampling = _GREEDY,
    rules: Rules = LLADA,
    constraint: Constraint | None = None,
    ends: Ends = NO_ENDS,
    horizon: int | None = None,
    given: Sequence[int | None] = (),
    answer_length: int | None = None,
) -> Generation:
    """Generate `gen_length` tokens after a prompt [prompt_len] int64, block by block.

    Without `ends` EOS ends nothing: the tokens after it are decoded too, as published. Prompt positions are never
    masked, whatever their ids. Raises ValueError for lengths that do not divide.

    Ours: with `ends` decoding stops at the step that reaches one, and what is behind may be masked. With a `horizon`
    the model sees no masks further behind than so many blocks from where the one under way begins. Tokens that are
    `given` of the answer stay, and the model sees them from the first forward on; a schedule counts the masked
    positions of a block alone, and penalties count them from the beginning of their block. Blocks behind
    `answer_length` tokens are context alone, and are not decoded.
    """
    steps = steps_per_block(gen_length, block_length, policy.steps)
    rules = replace(rules, unmasks_first_alone=rules.unmasks_first_alone and kv.unmasks_first_alone)
    tokens, is_masked = sequence_of(prompt, len(prompt) + gen_length, model.config.mask_token_id, given)
    predictor = Predictor(model, torch.arange(len(tokens)) < len(prompt), sampling.cfg_scale, rules.logit_shift)
    history = History(len(prompt))
    answer_length = gen_length if answer_length is None else answer_length
    for number, begin in enumerate(range(len(prompt), len(prompt) + answer_length, block_length)):
        end = begin + block_length
        seq_len = len(tokens) if horizon is None else min(len(tokens), begin + horizon * block_length)
        num_masked = int(is_masked[begin:end].sum())
        block = Block(begin, block_length, num_masked, steps, policy, sampling, rules, model.config.eos_token_id)
        block = under(constraint, block, tokens, len(prompt), given)
        step, known_before = 0, ~is_masked  # the step before
        # The published loops of LLaDA and Dream go on; but a forward that unmasks nothing changes nothing.
        while is_masked[begin:end].any():
            first, last, keeps = kv.span(number, step, (begin, end), seq_len, rules.logit_shift)
            # A policy may have masked a token again.
            predictor.before = known_before & ~is_masked if kv.delays(step, rules.logit_shift) else None
            known_before = ~is_masked
            logits = predictor.logits(tokens[:seq_len], first, last, keeps=keeps)
            take_step(tokens, is_masked, logits, first, block, history)
            step += 1
            if ends.reached(tokens[len(prompt) : end], is_masked[len(prompt) : end]):
                break
        if ends.reached(tokens[len(prompt) : end], is_masked[len(prompt) : end]):
            break
    return history.generation(tokens, nfe=predictor.nfe, nfe_refresh=predictor.nfe_refresh)
