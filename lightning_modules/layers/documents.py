"""Documents that follow each other in a row: where they begin, and which one a row ends with."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Known(NamedTuple):
    """What a state knows of the document before a call.

    Attributes:
        begun: whether there is one, bool `[B]`.
        document_id: its id, without meaning where there is none, int64 `[B]`.
    """

    begun: Tensor
    document_id: Tensor


def document_starts(document_ids: Tensor, real: Tensor, known: Known | None) -> Tensor:
    """Real tokens whose document differs from that of the real token before.

    Args:
        document_ids: int64 `[B, T]`; those of masked tokens have no meaning.
        real: bool `[B, T]`.
        known: the document before the call; None: nothing was read yet. The first token of a
            fresh row starts nothing.

    Returns:
        bool `[B, T]`.
    """
    time = torch.arange(real.shape[1], device=real.device)
    last = torch.where(real, time, -1).cummax(1).values
    last = torch.cat([torch.full_like(last[:, :1], -1), last[:, :-1]], dim=1)
    changes = document_ids != document_ids.gather(1, last.clamp(min=0))
    if known is None:
        return real & changes & (last >= 0)
    changes_here = known.begun.unsqueeze(1) & (document_ids != known.document_id.unsqueeze(1))
    return real & torch.where(last < 0, changes_here, changes)


def last_document(
    like: Tensor, mask: Tensor | None, document_ids: Tensor | None, state: Any | None
) -> Tensor:
    """Id of the document to which each row's last real token belongs, int64 `[B]`.

    Args:
        like: any tensor `[B, T, ...]` on the device of the result.
        mask: real tokens, bool `[B, T]`; None: all.
        document_ids: int64 `[B, T]`; None: all continue the state's.
        state: with a `document_id`, for rows without a real token; None: nothing was read yet.
    """
    if state is None:
        known = torch.zeros(like.shape[0], dtype=torch.int64, device=like.device)
    else:
        known = state.document_id
    if document_ids is None:
        return known
    if mask is None:
        return document_ids[:, -1].long()
    index = torch.arange(like.shape[1], device=like.device)
    last = torch.where(mask, index, -1).amax(1, keepdim=True)
    ids = document_ids.long().gather(1, last.clamp(min=0)).squeeze(1)
    return torch.where(last.squeeze(1) >= 0, ids, known)
