"""Program of one tensor-parallel rank: its head's statistics of some rows, from vLLM's own LM head and collectives.

Arguments: rank, folder. Writes FOLDER/rankN.pt: [statistics of each case], as the fields of `PartialStats`.
"""

import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import (
    destroy_distributed_environment,
    destroy_model_parallel,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from vllm_dllm import noise
from vllm_dllm.engine.head import choose_head
from vllm_dllm.models.transformer import MaskedDiffusionLM
from vllm_dllm.ops.vocab_stats import PartialStats, RowSampling
from vllm_dllm.unmask.head import LogitsHead, MergedHead, WeightHead

NUM_RANKS, VOCAB, HIDDEN, ROWS, MASK, SCALE = 2, 113, 24, 9, 5, 0.5


def inputs() -> tuple[torch.Tensor, torch.Tensor, list[RowSampling | None]]:
    """Return the head's weight, hidden rows, and how they are sampled: greedily, with draws, with filters too."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator)
    row = torch.arange(ROWS)
    drawn = RowSampling(
        temperature=row.double() / 4,
        top_k=row % 4,
        top_p=1.0 - row.double() / 20,
        keys=noise.stream_keys(torch.tensor(7), row, torch.tensor(3)),
        has_filter=False,
    )
    return weight, hidden, [None, drawn, RowSampling(**(asdict(drawn) | {"has_filter": True}))]


def found(model: Any) -> list[PartialStats]:
    """Return the statistics that the chosen head makes, as dictionaries."""
    head = choose_head(model, VOCAB, MASK, torch.device("cpu")).own
    # A scaled head is not the op's, as none is on a GPU: both ways, by the weight and by the part's logits.
    own = WeightHead if model.logits_processor.scale == 1.0 else LogitsHead
    assert isinstance(head, MergedHead), head
    assert isinstance(head.own, own), head.own
    _, hidden, samplings = inputs()
    return [head(hidden.clone(), sampling, 3) for sampling in samplings]


def main(rank: int, folder: Path) -> None:
    with set_current_vllm_config(VllmConfig()), torch.inference_mode():
        init_distributed_environment(NUM_RANKS, rank, f"file://{folder}/store", rank, "gloo")
        initialize_model_parallel(NUM_RANKS)
        results = []
        for scale in (1.0, SCALE):
            lm_head = ParallelLMHead(VOCAB, HIDDEN)
            lm_head.weight_loader(lm_head.weight, inputs()[0])
            lm_head.quant_method.process_weights_after_loading(lm_head)
            model = SimpleNamespace(lm_head=lm_head, logits_processor=LogitsProcessor(VOCAB, scale=scale))
            for name in ("head_logits", "own_logits"):
                setattr(model, name, getattr(MaskedDiffusionLM, name).__get__(model))
            results += found(model)
        torch.save([asdict(stats) for stats in results], folder / f"rank{rank}.pt")
        destroy_model_parallel()
        destroy_distributed_environment()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
