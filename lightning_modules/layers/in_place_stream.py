"""What the convolution of In-Place TTT needs of earlier calls, so that any split is one pass.

A value is convolved from targets of its own chunk. Of an open chunk the state keeps the last K - 1
targets, which the values of later calls may still read. If the convolution is symmetric with h
taps into the future, the last h values of an open chunk are not known yet: their tokens are *held*
(z is kept, too), and join the next call, in which they write.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_modules.layers.chunk_conv import ChunkConv
from lightning_modules.ops import InPlaceState
from lightning_modules.ops.grid import MoveRows, Progress, inverse
from lightning_modules.ops.in_place.places import Places, find_places


class InPlaceMLPState(NamedTuple):
    """What an `InPlaceMLP` carries from one call to the next; all zeros means fresh.

    Attributes:
        dw: as in `InPlaceState`.
        pending_dw: as in `InPlaceState`, without the held tokens.
        targets: the last targets of the open chunk, before zeros if it has fewer, `[B, K - 1, D]`.
        held: z of its last tokens, those that are not in `pending_dw`, likewise `[B, h, F]`.
        pending_count: as in `InPlaceState`, held tokens included; so are the others.
    """

    dw: Tensor
    pending_dw: Tensor
    targets: Tensor
    held: Tensor
    pending_count: Tensor
    tokens_seen: Tensor
    document_id: Tensor


class Reading(NamedTuple):
    """Arguments of `ops.in_place`; v is what its values are projected from."""

    z: Tensor
    v: Tensor
    mask: Tensor | None
    document_ids: Tensor | None
    state: InPlaceState | None


class StreamPlan(NamedTuple):
    """The tokens of a call among those that the state kept.

    Attributes:
        places: of the call's tokens.
        order: the call's tokens one after the other without masked ones in between, as indices
            `[B, T]` (the rest of them arbitrary); None: as they are.
        slot: the inverse, -1 for masked tokens, `[B, T]`.
        count: tokens of the call that exist, `[B]`.
        held_before: held tokens that join the call, `[B]`.
        held_after: tokens that the next call gets, `[B]`.
    """

    places: Places
    order: Tensor | None
    slot: Tensor | None
    count: Tensor
    held_before: Tensor
    held_after: Tensor


def plan_stream(
    x: Tensor,
    size: int,
    future: int,
    mask: Tensor | None,
    document_ids: Tensor | None,
    state: InPlaceMLPState | None,
) -> StreamPlan:
    """Plan a call. Nothing waits for the device.

    Args:
        x: `[B, T, ...]`.
        size: tokens of a chunk.
        future: h, taps of the convolution into the future.
        mask: real tokens, bool `[B, T]`; None: all.
        document_ids: `[B, T]`; None: one document without end.
        state: before the call; None: fresh.
    """
    before = Progress.of(state, x)
    places = find_places(x, size, mask, document_ids, before)
    order = slot = None
    if mask is not None:
        rank = mask.cumsum(1) - 1
        row = torch.arange(len(x), device=x.device).unsqueeze(1) * x.shape[1]
        slot = torch.where(mask, row + rank, -1)
        order = inverse(slot.flatten(), slot.numel()).view_as(slot)
    held = (progress.pending_count.clamp(max=future) for progress in (before, places.after))
    return StreamPlan(places, order, slot, places.valid.sum(1), *held)


def convolve(
    conv: ChunkConv, x: Tensor, plan: StreamPlan, state: InPlaceMLPState | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Values of the held tokens and of the call's, and the targets that the next call needs.

    Args:
        conv: the convolution.
        x: targets, `[B, T, D]`.
        plan: of the call.
        state: before the call; None: fresh.

    Returns:
        `[B, h, D]` (right-aligned), `[B, T, D]` and `[B, K - 1, D]`.
    """
    batch, time, size = x.shape
    kept, future = conv.kernel_size - 1, conv.future
    number = plan.places.document[:, :-1] * (time + 1) + plan.places.chunk[:, :-1]
    if plan.order is not None and plan.slot is not None:
        x = MoveRows.apply(x.flatten(0, 1), plan.order.flatten(), plan.slot.flatten()).view_as(x)
        index = plan.order.clamp(min=0) % time
        number = number.gather(1, index).masked_fill(plan.order < 0, -1)
    before = x.new_zeros(batch, kept, size) if state is None else state.targets.to(x.dtype)
    count = Progress.of(state, x).pending_count.unsqueeze(1)
    exists = torch.arange(kept, 0, -1, device=x.device) <= count
    sequence = torch.cat([before, x], dim=1)
    y = conv(sequence, torch.cat([torch.where(exists, 0, -1), number], dim=1))
    held, values = y[:, kept - future : kept], y[:, kept:]
    if plan.order is not None and plan.slot is not None:
        values = MoveRows.apply(values.flatten(0, 1), plan.slot.flatten(), plan.order.flatten())
        values = values.view_as(x)
    return held, values, _last(sequence, plan.count, plan.places.after.pending_count, kept)


def hold(z: Tensor, plan: StreamPlan, future: int, state: InPlaceMLPState | None) -> Tensor:
    """The z that the next call gets, `[B, h, F]`, from those of this one, `[B, T, F]`."""
    before = z.new_zeros(len(z), future, z.shape[2]) if state is None else state.held.to(z.dtype)
    order = None
    if plan.order is not None:
        first = torch.arange(future, device=z.device).expand(len(z), -1)
        order = torch.cat([first, future + plan.order.clamp(min=0) % z.shape[1]], dim=1)
    return _last(torch.cat([before, z], dim=1), plan.count, plan.held_after, future, order)


def resume(reading: Reading, held: Tensor, plan: StreamPlan, state: InPlaceMLPState) -> Reading:
    """Arguments of the op that go on from a state: the held tokens come before the call's.

    Args:
        reading: of the call alone.
        held: values of the held tokens, `[B, h, D]`.
        plan: of the call.
        state: before the call.
    """
    future, document_ids, mask = held.shape[1], reading.document_ids, reading.mask
    if document_ids is not None:
        theirs = state.document_id.unsqueeze(1).expand(-1, future).to(document_ids.dtype)
        document_ids = torch.cat([theirs, document_ids], dim=1)
    if future:
        exists = torch.arange(future, 0, -1, device=held.device) <= plan.held_before.unsqueeze(1)
        mask = torch.cat([exists, plan.places.valid], dim=1)
    return Reading(
        z=torch.cat([state.held.to(reading.z.dtype), reading.z], dim=1),
        v=torch.cat([held, reading.v], dim=1),
        mask=mask,
        document_ids=document_ids,
        state=InPlaceState(
            state.dw,
            state.pending_dw,
            state.pending_count - plan.held_before,
            state.tokens_seen - plan.held_before,
            state.document_id,
        ),
    )


def writes(plan: StreamPlan, held: int) -> Tensor:
    """Tokens that the next call does not get, bool `[B, held + T]`, with `held` before the call."""
    rank = plan.places.valid.cumsum(1) - 1
    before = torch.arange(-held, 0, device=rank.device).expand(len(rank), -1)
    return torch.cat([before, rank], dim=1) < (plan.count - plan.held_after).unsqueeze(1)


def _last(
    sequence: Tensor, start: Tensor, count: Tensor, length: int, order: Tensor | None = None
) -> Tensor:
    """`length` tokens from `start` on, 0 but for the last `count` of them.

    Args:
        sequence: `[B, S, E]`.
        start: `[B]`.
        count: `[B]`.
        length: of the result.
        order: index of each token in the sequence, `[B, S]`; None: as they are.
    """
    place = torch.arange(length, device=sequence.device)
    index = start.unsqueeze(1) + place
    if order is not None:
        index = order.gather(1, index)
    found = sequence.gather(1, index.unsqueeze(-1).expand(-1, -1, sequence.shape[-1]))
    absent = place < length - count.unsqueeze(1)
    dtype = torch.promote_types(sequence.dtype, torch.float32)
    return found.masked_fill(absent.unsqueeze(-1), 0).to(dtype)
