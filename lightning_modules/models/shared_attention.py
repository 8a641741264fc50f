"""Attention of Hugging Face decoders over rows that processes share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from lightning_modules.ops.processes import gather_from, gather_tokens, own_part
from lightning_modules.streams import FastState

NAME = "shared_rows"
UNKNOWN = ("softcap", "s_aux", "position_bias")
"""Keywords of attention that is not a plain softmax over keys."""


def share_attention(model: PreTrainedModel) -> None:
    """Let a decoder's attention see the keys of all parts of a row; calls then need a group.

    Raises:
        ValueError: the model has attention of its own that cannot be exchanged.
    """
    AttentionInterface.register(NAME, shared_attention)
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise ValueError(
            f"the attention of {type(model).__name__} cannot be exchanged, so that its rows cannot "
            "be shared: train it without ContextParallel"
        )


def shared_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    fast_state: FastState | None = None,
    document_ids: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention of the own tokens to those of all parts, which are sent to everyone.

    Args:
        module: the attention.
        query: of the own tokens, `[B, H, T, D]`.
        key: likewise, of as many heads or fewer.
        value: likewise.
        attention_mask: none.
        dropout: probability.
        scaling: of the scores; None: `1 / sqrt(D)`.
        sliding_window: tokens that a token sees, itself included; None: all.
        fast_state: whose group shares the rows.
        document_ids: of the own tokens, `[B, T]`; no token sees another document.
        **options: what other attention takes.

    Returns:
        `[B, T, H, D]`, and no weights.

    Raises:
        ValueError: the call has no group, a mask, or attention is of another kind.
    """
    if fast_state is None or fast_state.group is None:
        raise ValueError(
            "the model's rows are shared by processes, but this call has no fast_state with a "
            "group: use model.set_attn_implementation('sdpa') to call it alone"
        )
    other = [name for name in UNKNOWN if options.get(name) is not None]
    if attention_mask is not None or other:
        raise ValueError(
            f"attention with {', '.join(other) or 'attention_mask'} cannot share rows: use "
            "document_ids for packed rows, or no ContextParallel"
        )
    group = fast_state.group
    both = gather_from(torch.cat([key, value], dim=-1), group)
    keys, values = both.movedim(0, 2).flatten(2, 3).chunk(2, dim=-1)
    out = scaled_dot_product_attention(
        query,
        keys,
        values,
        attn_mask=_visible(query, sliding_window, document_ids, group),
        dropout_p=dropout,
        scale=scaling,
        enable_gqa=True,
    )
    return out.transpose(1, 2).contiguous(), None


def _visible(
    query: Tensor, window: int | None, document_ids: Tensor | None, group: ProcessGroup
) -> Tensor:
    """Which of all tokens the own ones see, bool `[B or 1, 1, T, P T]`."""
    time = query.shape[2]
    column = torch.arange(group.size() * time, device=query.device)
    own = column[own_part(time, group)].unsqueeze(1)
    visible = column <= own
    if window is not None:
        visible = visible & (column > own - window)
    visible = visible[None, None]
    if document_ids is not None:
        ids = gather_tokens(document_ids, group)
        visible = visible & (document_ids.unsqueeze(2) == ids.unsqueeze(1)).unsqueeze(1)
    return visible
