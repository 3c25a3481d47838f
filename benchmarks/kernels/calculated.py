"""What a layer's attention does on a GPU, counted and not measured: `python -m benchmarks.kernels.calculated`.

A denoising step of some requests, in the CUDA graph of its number of rows: CTAs, launches, bytes. `before` states the
rule that `attention.tiles` replaced: splits by the page table's width, empty ones written and read.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from vllm_dllm.attention.layout import HostLayout, denoise_layout
from vllm_dllm.attention.tiles import (
    H200_MULTIPROCESSORS,
    LEAST_SPLIT,
    TILE_QUERIES,
    max_num_tiles,
    num_splits,
    query_tiles,
)

KEYS = 64  # of a tile, in 16-bit types
HEAD_DIM, BYTES = 128, 2


@dataclass(frozen=True, slots=True)
class Shape:
    """A denoising step: requests with a block in the middle of their sequence, and drafts of it."""

    model: str
    num_heads: int
    num_kv_heads: int
    block_length: int
    num_requests: int
    num_drafts: int
    context_len: int
    max_model_len: int
    max_num_seqs: int

    @property
    def num_rows(self) -> int:
        """Rows of the forward."""
        return self.num_requests * (1 + self.num_drafts) * self.block_length

    def layout(self) -> HostLayout:
        """Say who sees whom."""
        start = np.full(self.num_requests, self.context_len // 2)
        end = np.full(self.num_requests, self.context_len + self.block_length)
        return denoise_layout(start, end, num_nodes=1 + self.num_drafts, block_length=self.block_length)


@dataclass(frozen=True, slots=True)
class Work:
    """What a layer launches."""

    num_ctas: int
    num_busy: int  # that have keys
    longest: int  # tiles of 64 keys that a CTA works through, at most
    num_launches: int
    workspace_bytes: int  # written and read


def before(shape: Shape) -> Work:
    """Count what splits of 1,024 positions or more, of the page table's width, make."""
    splits = min(16, -(-shape.max_model_len // 1024))
    length = -(-shape.max_model_len // splits // KEYS) * KEYS
    heads_per_kv = shape.num_heads // shape.num_kv_heads
    num_tiles = len(query_tiles(shape.layout(), heads_per_kv))
    grid = shape.num_rows * heads_per_kv // TILE_QUERIES + min(shape.num_rows // shape.block_length, shape.max_num_seqs)
    span = shape.context_len + shape.block_length
    own = _own_tiles(shape)
    of_split = [-(-min(max(span - i * length, 0), length) // KEYS) + own * (i == splits - 1) for i in range(splits)]
    busy = sum(tiles > 0 for tiles in of_split)
    parts = splits * min(shape.num_rows, TILE_QUERIES * (shape.num_rows // shape.block_length))
    return Work(
        num_ctas=(grid + 2) * shape.num_kv_heads * splits,
        num_busy=num_tiles * shape.num_kv_heads * busy,
        longest=max(of_split),
        num_launches=1 + (splits > 1),
        workspace_bytes=_workspace(shape, parts) if splits > 1 else 0,
    )


def after(shape: Shape) -> Work:
    """Count what `attention.tiles` makes."""
    heads_per_kv = shape.num_heads // shape.num_kv_heads
    num_requests = min(shape.num_rows // shape.block_length, shape.max_num_seqs) + 1
    grid = max_num_tiles(shape.num_rows, num_requests, shape.block_length, heads_per_kv)
    splits = num_splits(shape.num_rows, shape.num_heads, shape.num_kv_heads, shape.max_model_len, H200_MULTIPROCESSORS)
    span = shape.context_len + shape.block_length
    length = max(LEAST_SPLIT, -(-span // splits // KEYS) * KEYS) if splits > 1 else span
    own = _own_tiles(shape)
    of_split = [-(-min(max(span - i * length, 0), length) // KEYS) + own * (i == splits - 1) for i in range(splits)]
    busy = sum(tiles > 0 for tiles in of_split)
    num_tiles = len(query_tiles(shape.layout(), heads_per_kv))
    return Work(
        num_ctas=grid * shape.num_kv_heads * splits,
        num_busy=num_tiles * shape.num_kv_heads * busy,
        longest=max(of_split),
        num_launches=1 + (splits > 1),
        workspace_bytes=_workspace(shape, busy * shape.num_rows) if splits > 1 else 0,
    )


def _own_tiles(shape: Shape) -> int:
    """Return the tiles of own rows that a CTA has: each node begins at a multiple of 16 slots."""
    heads_per_kv = shape.num_heads // shape.num_kv_heads
    rows = -(-TILE_QUERIES // heads_per_kv)
    nodes = min(1 + shape.num_drafts, -(-rows // shape.block_length))
    return -(-nodes * (-(-shape.block_length // 16) * 16) // KEYS)


def _workspace(shape: Shape, parts: int) -> int:
    return 2 * 4 * parts * shape.num_heads * (HEAD_DIM + 2)


def shapes() -> Iterator[Shape]:
    """Yield LLaDA-8B and SDAR-8B at three batches, without drafts and with three."""
    for model, num_kv_heads, block_length in (("LLaDA-8B", 32, 32), ("SDAR-8B", 8, 8)):
        for num_requests in (1, 4, 16):
            for num_drafts in (0, 3):
                yield Shape(model, 32, num_kv_heads, block_length, num_requests, num_drafts, 1024, 4096, 16)


def table() -> str:
    """Return the table of docs/benchmarks.md."""
    titles = "model | requests | drafts | rows | K/V MB | CTAs | with keys | longest | launches | workspace MB"
    lines = [f"| {titles} |", "|---" * 10 + "|"]
    for shape in shapes():
        old, new = before(shape), after(shape)
        kv = shape.num_requests * shape.context_len * shape.num_kv_heads * 2 * HEAD_DIM * BYTES
        pairs = [
            (old.num_ctas, new.num_ctas),
            (old.num_busy, new.num_busy),
            (old.longest, new.longest),
            (old.num_launches, new.num_launches),
        ]
        counts = " | ".join(f"{was:,} → {now:,}" for was, now in pairs)
        moved = f"{old.workspace_bytes / 1e6:.1f} → {new.workspace_bytes / 1e6:.1f}"
        cells = f"{shape.model} | {shape.num_requests} | {shape.num_drafts} | {shape.num_rows} | {kv / 1e6:.1f}"
        lines.append(f"| {cells} | {counts} | {moved} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
