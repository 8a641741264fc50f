"""In which document and chunk every token of a call stands, without waiting for the device."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_modules.ops.grid import Progress, document_starts


class Places(NamedTuple):
    """Where every token of a call stands, and the token that would follow the call.

    Attributes:
        valid: tokens that exist, bool `[B, T]`.
        document: documents that have begun up to each token, 0 for the state's, `[B, T + 1]`.
        chunk: full chunks of its document before each token, `[B, T + 1]`.
        after: the progress after the call.
    """

    valid: Tensor
    document: Tensor
    chunk: Tensor
    after: Progress


def find_places(
    like: Tensor,
    size: int,
    mask: Tensor | None,
    document_ids: Tensor | None,
    before: Progress,
) -> Places:
    """Cut the tokens that exist into chunks: a document begins one, an open one goes on.

    Args:
        like: any tensor `[B, T, ...]` on the device of the others.
        size: C; a chunk ends with its last token.
        mask: tokens that exist, bool `[B, T]`; None: all.
        document_ids: `[B, T]`; None: one document without end.
        before: the progress before the call, with fewer than C tokens in the open chunk.
    """
    valid = like.new_ones(like.shape[:2], dtype=torch.bool) if mask is None else mask
    rank = valid.cumsum(1) - 1
    starts, after = document_starts(valid, rank, document_ids, before)
    waiting = -before.pending_count.unsqueeze(1)
    begin = torch.where(starts, rank, waiting).cummax(1).values
    document = starts.cumsum(1)
    # Tokens of the document before this one; a masked token stands where the next one would.
    ahead = rank + ~valid - begin
    ahead = torch.cat([ahead, rank[:, -1:] + 1 - begin[:, -1:]], dim=1)
    document = torch.cat([document, document[:, -1:]], dim=1)
    chunk = ahead.div(size, rounding_mode="floor")
    after = after._replace(pending_count=ahead[:, -1] % size)
    return Places(valid, document, chunk, after)
