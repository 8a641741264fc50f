"""What a router decides on: means of hidden states, taken over tokens that a decision may see.

A mean travels as a sum whose last channel counts the tokens, `[..., d + 1]`; see `counted` and
`mean_of`. Documents are numbered in the call: 0 continues the one that the state ended with.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.layers.window_sums import window_sums


class RouterState(NamedTuple):
    """What a router has pooled of each row so far; all zeros means fresh.

    Sums count their tokens in a last channel and are float32, or float64 if the hidden states
    are. Fields that a strategy does not need have a size of 0.

    Attributes:
        position: tokens since the first real one of the row, masked ones after it included; 0
            means that there was none (int64, `[B]`).
        document_id: id of the last real token's document, without meaning where `position` is 0
            (int64, `[B]`).
        total: sum over what is pooled of the document: tokens of closed blocks (`block`), of the
            prompt (`prompt`), all (`sequence`), `[B, d + 1]`.
        recent: what is not pooled yet or will leave again: the sum over the open block,
            `[B, 1, d + 1]`, or the last W - 1 tokens (`rolling`), `[B, W - 1, d + 1]`.
    """

    position: Tensor
    document_id: Tensor
    total: Tensor
    recent: Tensor


class Pooled(NamedTuple):
    """What decisions are made on, and what is carried.

    Attributes:
        sums: sums with counts, one per decision, `[B, n, d + 1]`.
        total: of the next state.
        recent: of the next state.
    """

    sums: Tensor
    total: Tensor
    recent: Tensor


def counted(x: Tensor, real: Tensor | None) -> Tensor:
    """x with a last channel of ones, all 0 where not `real`.

    Args:
        x: `[..., d]`.
        real: bool `[...]`; None: all are.

    Returns:
        `[..., d + 1]`, float32 at least.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if real is None:
        return F.pad(x, (0, 1), value=1.0)
    real = real.unsqueeze(-1)
    return torch.cat([torch.where(real, x, 0.0), real.to(x.dtype)], dim=-1)


def mean_of(sums: Tensor, default: Tensor | None) -> Tensor:
    """Means of sums with counts.

    Args:
        sums: `[..., d + 1]`.
        default: what takes the place of an empty mean, `[d]`; None: zeros.

    Returns:
        `[..., d]`.
    """
    total, count = sums[..., :-1], sums[..., -1:]
    mean = total / count.clamp(min=1)
    return mean if default is None else torch.where(count > 0, mean, default.to(mean.dtype))


def first_position(x: Tensor, mask: Tensor | None, state: RouterState | None) -> Tensor:
    """Position of every row's first token of the call x `[B, T, ...]`, int64 `[B]`.

    It counts from the first real token of the row: with padding before that it is negative.
    """
    rows, length = x.shape[:2]
    start = torch.zeros(rows, dtype=torch.int64, device=x.device)
    if mask is not None:
        index = torch.arange(length, device=x.device)
        start = -torch.where(mask, index, length).amin(1)
    return start if state is None else torch.where(state.position > 0, state.position, start)


def pool_window(
    x: Tensor,
    window: int,
    *,
    real: Tensor | None = None,
    document: Tensor | None = None,
    state: RouterState | None = None,
) -> Pooled:
    """Every token: over itself and those of the last `window - 1` places that are of its document.

    Masked tokens keep their place, but are not counted (except a masked token for itself, so that
    no mean is empty).

    Args:
        x: hidden states, `[B, T, d]`.
        window: W.
        real: bool `[B, T]`; None: all.
        document: int64 `[B, T]`; None: all continue the state's.
        state: with the W - 1 tokens before the call; None: there are none.
    """
    rows, length, width = x.shape
    values, known = counted(x, real), window - 1
    recent = values.new_zeros(rows, known, width + 1) if state is None else state.recent
    history = torch.cat([recent, values], dim=1)
    number = None if document is None else F.pad(document, (known, 0))
    sums = window_sums(history, number, window)[:, known:]
    if real is not None:
        sums = sums + torch.where(real.unsqueeze(-1), 0.0, counted(x, None))
    recent = history[:, length:]
    if number is not None:
        same = number[:, length:] == number[:, -1:]
        recent = torch.where(same.unsqueeze(-1), recent, 0.0)
    return Pooled(sums, values.new_zeros(rows, 0), recent)


def pool_prompt(
    x: Tensor,
    prompt: Tensor | None,
    *,
    real: Tensor | None = None,
    document: Tensor | None = None,
    state: RouterState | None = None,
) -> Pooled:
    """Every token: over the prompt tokens of its document up to and including it.

    An answer is so routed by the mean of the prompt before it, and a further turn goes on with
    that mean.

    Args:
        x: hidden states, `[B, T, d]`.
        prompt: tokens of a prompt, bool `[B, T]`; None takes all tokens of a call for prompt, and
            a single token for answer, if its document has a prompt already (generation).
        real: bool `[B, T]`; None: all.
        document: int64 `[B, T]`; None: all continue the state's.
        state: what was pooled before the call; None: nothing.
    """
    if prompt is None and x.shape[1] == 1 and state is not None:
        prompt = state.total[:, -1:] == 0
        if document is not None:
            prompt = prompt | (document > 0)
    if real is not None and prompt is not None:
        prompt = prompt & real
    sums = window_sums(counted(x, real if prompt is None else prompt), document)
    sums = sums + _carried(state, document, sums)
    return Pooled(sums, sums[:, -1], sums.new_zeros(len(x), 0, 0))


def pool_sequence(
    x: Tensor,
    *,
    real: Tensor | None = None,
    document: Tensor | None = None,
    state: RouterState | None = None,
) -> Pooled:
    """Over all tokens of a document that the call has, earlier and later ones: not causal.

    With a state those that were read before count, too, so that a sequence that is read in pieces
    (decoding) is routed otherwise than one that is read at once. Arguments as above; without
    documents there is one decision per row.
    """
    values = counted(x, real)
    if document is None:
        sums = values.sum(1, keepdim=True)
    else:
        later = window_sums(values.flip(1), document.flip(1)).flip(1)
        sums = window_sums(values, document) + later - values
    sums = sums + _carried(state, document, sums)
    return Pooled(sums, sums[:, -1], sums.new_zeros(len(x), 0, 0))


def _carried(state: RouterState | None, document: Tensor | None, like: Tensor) -> Tensor:
    """What the state adds to the sums of the tokens that continue its document."""
    if state is None:
        return torch.zeros((), dtype=like.dtype, device=like.device)
    total = state.total.unsqueeze(1).to(like.dtype)
    return total if document is None else torch.where((document == 0).unsqueeze(-1), total, 0.0)
