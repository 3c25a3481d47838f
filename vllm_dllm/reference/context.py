"""What a block sees while it is denoised: nothing of it depends on the block, so drafts of it may be evaluated."""

import torch
from torch import Tensor

from vllm_dllm.reference.decode import KvPolicy, Model, Predictor
from vllm_dllm.reference.layers import LayerKv


class Frozen:
    """What a block sees under a KV policy that freezes it: the keys and values that the block began with."""

    def __init__(self, predictor: Predictor, kv: KvPolicy, horizon: int | None) -> None:
        self.predictor = predictor
        self.model = predictor.model
        self.kv = kv
        self.horizon = horizon

    def begin_block(self, tokens: Tensor, begin: int, end: int) -> Tensor | None:
        """Refresh; the refresh sees the block too, all masked, so it predicts it: [end - begin, vocab]."""
        visible_end = None if self.horizon is None else begin + self.horizon * (end - begin)
        self.tokens, self.block, self.step = tokens[:visible_end], (begin, end), 0
        return self.predict(tokens[begin:end], begin)

    def begin_call(self) -> tuple[bool, bool]:
        """Begin a call; tell whether it may have drafts, as warm-up steps may not, and whether it refreshes."""
        self.step += 1
        keeps = self._span()[2]
        return not keeps or self.kv.refresh_every == 1, keeps

    def predict(self, canvas: Tensor, begin: int) -> Tensor:
        """Predict a canvas [block_length] int64 at `begin`: [block_length, vocab]."""
        first, last, keeps = self._span()
        end = begin + len(canvas)
        tokens = torch.cat([self.tokens[:begin], canvas, self.tokens[end:]])
        return self.predictor.logits(tokens, first, last, keeps=keeps)[begin - first : end - first]

    def _span(self) -> tuple[int, int, bool]:
        begin, end = self.block
        number = (begin - int(self.predictor.is_prompt.sum())) // (end - begin)
        return self.kv.span(number, self.step, self.block, len(self.tokens), self.predictor.logit_shift)


class StoredBlocks:
    """What a block of a block-causal model sees: the blocks before it."""

    def __init__(self, model: Model, kept: list[LayerKv] | None, num_stored: int) -> None:
        self.model = model
        self.kept = kept
        self.num_stored = num_stored  # positions

    def begin_call(self) -> tuple[bool, bool]:
        """Begin a call; each may have drafts, and none refreshes."""
        return True, False

    def begin_block(self, tokens: Tensor, begin: int, end: int) -> Tensor | None:
        """Store the block before, if it is not; that predicts nothing."""
        if self.num_stored < begin:
            self.kept = self.model.forward(tokens[self.num_stored : begin], self.num_stored, self.kept)[1]
            self.num_stored = begin
        return None

    def predict(self, canvas: Tensor, begin: int) -> Tensor:
        """Predict a canvas [block_length] int64 at `begin`: [block_length, vocab]."""
        return self.model.forward(canvas, begin, self.kept)[0]
