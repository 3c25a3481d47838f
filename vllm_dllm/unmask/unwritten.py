"""What a policy may write that writes any token, the mask token too, but comes back to no canvas by the same one.

Statistics of rows leave the mask token out, whose logit such a policy asks for, and besides for the likeliest of the
tokens that a position did not take yet: a second reduction, of the whole vocabulary, since any number may be taken.
"""

import torch
from torch import Tensor

from vllm_dllm.ops.vocab_stats import RowIds
from vllm_dllm.unmask.head import Head


def other_tokens(head: Head, hidden: Tensor, written: Tensor, mask_token_id: int, vocab_size: int) -> Tensor:
    """Return of each row the mask token's logit, the likeliest id not written, and its logit; [num_rows, 3] float64.

    The id is never the mask token, and -1 where all others are written.

    Args:
        head: reduces rows.
        hidden: [num_rows, hidden_size].
        written: [num_rows, n] ids of each row's position, none twice but -1.
        mask_token_id: of the model.
        vocab_size: of the model.
    """
    written = torch.where(written == mask_token_id, -1, written).long()
    words = torch.full((len(hidden), -(-vocab_size // 32)), -1, dtype=torch.int32, device=hidden.device)
    bits = torch.where(written < 0, 0, 1 << (written % 32)).to(torch.int32)
    words.scatter_add_(1, written.clamp(min=0) // 32, -bits)
    given = torch.full((len(hidden), 1), mask_token_id, device=hidden.device)
    stats = head(hidden, None, 2, RowIds(given, words, takes_mask=True))
    assert stats.given_logits is not None, "it is asked for"
    place = (stats.top_ids[:, :1] == mask_token_id).long()
    found = (stats.given_logits, stats.top_ids.gather(1, place), stats.top_logits.gather(1, place))
    return torch.cat([each.double() for each in found], 1)
