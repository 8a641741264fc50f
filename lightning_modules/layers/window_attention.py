"""Causal sliding-window attention that carries its window, so that a stream is read in pieces.

Real tokens are numbered per document; token t attends to the real tokens t - Wn + 1 to t of its
document. A masked token takes no number and no place in a window. What later tokens may still
attend to is a value that the call returns: training on streams of chunks, evaluation and decoding
token by token are the same computation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.layers.documents import last_document
from lightning_modules.layers.flex_window import FlexWindow
from lightning_modules.layers.rope import document_positions

BLOCK = 128
"""Queries of a block, at least: smaller blocks spend their time between the matrix products."""


class WindowState(NamedTuple):
    """Keys and values that later tokens may attend to; all zeros means fresh.

    Attributes:
        keys: keys (rotated, if attention has rotary positions) of the last S real tokens of the
            document, newest last, zero where there are fewer, `[B, S, H, D]`. S is Wn - 1;
            without a window it grows by T in every call, and shrinks to the longest document when
            rows have started afresh.
        values: their values, `[B, S, H, D]`.
        tokens_seen: real tokens of the document so far (int64, `[B]`).
        document_id: id of that document, without meaning where `tokens_seen` is 0 (int64, `[B]`).
    """

    keys: Tensor
    values: Tensor
    tokens_seen: Tensor
    document_id: Tensor


class WindowPlan(NamedTuple):
    """Which tokens of a call attend to which: the same in every layer, so made once.

    Tokens stand in *columns*: the S carried ones, then the real tokens of the call, then masked
    ones. Token j of the call attends to the columns `first[j]` to `S + j`.

    Attributes:
        positions: number of every token in its document, `[B, T]` or `[1, T]` (int64).
        carried: S; of the state's columns the last S.
        window: Wn, or None.
        mask: real tokens, bool `[B, T]`, or None: all.
        order: where the j-th real token stands in the call, masked ones last, `[B, T]`, or None.
        rank: its inverse, `[B, T]`, or None.
        first: first column that the j-th real token attends to, never less than the one before;
            masked ones attend to themselves, `[B, T]` or `[1, T]`.
        kept: column that goes into each slot of the next state, -1 for none, `[B, S']`; None: the
            last ones.
        tokens_seen: of the next state, `[B]`.
        document_id: of the next state, `[B]`.
        everything: whether every token attends to every token before it, and nothing is carried.
        flex: the same on a GPU that runs it as one kernel, or None.
    """

    positions: Tensor
    carried: int
    window: int | None
    mask: Tensor | None
    order: Tensor | None
    rank: Tensor | None
    first: Tensor
    kept: Tensor | None
    tokens_seen: Tensor
    document_id: Tensor
    everything: bool
    flex: FlexWindow | None


def plan_window(
    x: Tensor,
    window: int | None,
    *,
    mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    state: WindowState | None = None,
) -> WindowPlan:
    """Number the tokens of a call, and say which attend to which.

    Args:
        x: `[B, T, ...]`, on the device and in the dtype of attention.
        window: Wn, tokens that a token attends to, itself included; None: all.
        mask: real tokens, bool `[B, T]`; None: all.
        document_ids: int64 `[B, T]`: no token attends to another document's; None: one document.
        state: result of the call before; None starts fresh.

    Without a window this waits for the device once, to know how far back the documents reach.

    Raises:
        ValueError: the state is of another window or of other rows.
    """
    rows, length = x.shape[:2]
    carried = 0 if state is None else carried_columns(state, window, rows)
    positions = document_positions(x, mask, document_ids, state)
    order = rank = None
    index = torch.arange(length, device=x.device).unsqueeze(0)
    real, before = length, positions
    if mask is not None:
        order = torch.argsort(~mask, dim=1, stable=True)
        rank = torch.argsort(order, dim=1)
        real = mask.sum(1, keepdim=True)
        before = torch.where(index < real, positions.expand(rows, -1).gather(1, order), 0)
    if window is not None:
        before = before.clamp(max=window - 1)
    first = (carried + index - before).clamp(min=0)
    last = positions[:, -1] + (1 if mask is None else mask[:, -1].long())
    seen = last.expand(rows)
    kept = None
    if mask is not None or document_ids is not None:
        slots = carried + length if window is None else window - 1
        slot = torch.arange(slots, device=x.device).unsqueeze(0)
        kept = torch.where(slot >= slots - seen.unsqueeze(1), carried + real - slots + slot, -1)
    alone = state is None and mask is None and document_ids is None
    return WindowPlan(
        positions=positions,
        carried=carried,
        window=window,
        mask=mask,
        order=order,
        rank=rank,
        first=first,
        kept=kept,
        tokens_seen=seen,
        document_id=last_document(x, mask, document_ids, state),
        everything=alone and (window is None or length <= window),
        flex=FlexWindow.of(x, first, carried),
    )


def carried_columns(state: WindowState, window: int | None, rows: int) -> int:
    """Columns of a state that are of use, checked. Waits for the device without a window."""
    if state.keys.shape[0] != rows:
        raise ValueError(
            f"the window holds {state.keys.shape[0]} rows, but the batch has {rows}: select the "
            "rows of the state, or start with state=None"
        )
    carried = state.keys.shape[1]
    if window is None:
        return min(carried, int(state.tokens_seen.max()))
    if carried != window - 1:
        raise ValueError(
            f"the window holds {carried} tokens, but window_size={window} carries {window - 1}: "
            "keep to one window_size, or start with state=None"
        )
    return carried


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: WindowPlan, state: WindowState | None = None
) -> tuple[Tensor, WindowState]:
    """`softmax(q k^T / sqrt(D)) v` over every token's window.

    Args:
        q: queries, rotated to `plan.positions`, `[B, T, H, D]`.
        k: keys, likewise.
        v: values, `[B, T, H, D]`.
        plan: from `plan_window`, with the same state.
        state: result of the call before; None starts fresh.

    Returns:
        `[B, T, H, D]`, 0 for masked tokens, and the window after the call.
    """
    if plan.order is not None:
        q, k, v = (_pick(x, plan.order) for x in (q, k, v))
    keys, values = k, v
    if state is not None:
        used = slice(state.keys.shape[1] - plan.carried, None)
        keys = torch.cat([state.keys[:, used].to(k.dtype), k], dim=1)
        values = torch.cat([state.values[:, used].to(v.dtype), v], dim=1)
    after = WindowState(_keep(keys, plan), _keep(values, plan), plan.tokens_seen, plan.document_id)
    heads = [x.transpose(1, 2) for x in (q, keys, values)]
    out = (_attend(*heads, plan) if plan.flex is None else plan.flex(*heads)).transpose(1, 2)
    if plan.rank is not None and plan.mask is not None:
        out = _pick(out, plan.rank).masked_fill(~plan.mask[..., None, None], 0)
    return out, after


def _pick(x: Tensor, columns: Tensor) -> Tensor:
    """The tokens `columns [B, N]` of x `[B, T, H, D]`, `[B, N, H, D]`."""
    return x.gather(1, columns[..., None, None].expand(-1, -1, *x.shape[2:]))


def _keep(x: Tensor, plan: WindowPlan) -> Tensor:
    """The columns `[B, S + T, H, D]` that the next state carries."""
    if plan.kept is not None:
        return _pick(x, plan.kept.clamp(min=0)) * (plan.kept >= 0)[..., None, None].to(x.dtype)
    slots = x.shape[1] if plan.window is None else plan.window - 1
    missing = max(slots - x.shape[1], 0)
    return F.pad(x[:, max(x.shape[1] - slots, 0) :], (0, 0, 0, 0, missing, 0))


def _attend(q: Tensor, keys: Tensor, values: Tensor, plan: WindowPlan) -> Tensor:
    """Attention in blocks of queries that see only the columns they may need.

    Time and memory are O(T Wn) where one product with a mask would take O(T^2).

    Args:
        q: `[B, H, T, D]`.
        keys: `[B, H, S + T, D]`.
        values: `[B, H, S + T, D]`.
        plan: which columns every query sees.
    """
    if plan.everything:
        return F.scaled_dot_product_attention(q, keys, values, is_causal=True)
    length, carried, window = q.shape[2], plan.carried, plan.window
    column = torch.arange(keys.shape[2], device=q.device)
    out = []
    for start in range(0, length, max(window or 0, BLOCK)):
        end = min(start + max(window or 0, BLOCK), length)
        left = 0 if window is None else max(carried + start - window + 1, 0)
        seen = column[left : carried + end]
        visible = seen <= column[carried + start : carried + end, None]
        visible = visible & (seen >= plan.first[:, start:end, None])
        part = F.scaled_dot_product_attention(
            q[:, :, start:end],
            keys[:, :, left : carried + end],
            values[:, :, left : carried + end],
            attn_mask=visible.unsqueeze(1),
        )
        out.append(part)
    return torch.cat(out, dim=2) if len(out) > 1 else out[0]
