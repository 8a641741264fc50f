"""In-Place TTT without a matrix for every chunk: `Z (Z_prev^T V)`, masked to pairs that count."""

import torch
from torch import Tensor

from lightning_modules.ops.grid import Progress
from lightning_modules.ops.in_place.places import Places, find_places
from lightning_modules.ops.products import product
from lightning_modules.ops.states import InPlaceState


def read_history(
    z: Tensor,
    w: Tensor,
    size: int,
    clip: float | Tensor | None,
    mask: Tensor | None,
    document_ids: Tensor | None,
    state: InPlaceState | None,
) -> tuple[Tensor, InPlaceState]:
    """What S adds to the outputs, and the state after the call.

    Args:
        z: `[B, T, F]`.
        w: `eta v`, `[B, T, D]`.
        size: C.
        clip: largest norm of what a chunk adds, or None.
        mask: of the op, as are the other arguments.

    Returns:
        `S_i z_t`, `[B, T, D]`, and the state.
    """
    places = find_places(z, size, mask, document_ids, Progress.of(state, z))
    keys = z
    if mask is not None:
        hidden = ~mask.unsqueeze(-1)
        keys, w = z.masked_fill(hidden, 0), w.masked_fill(hidden, 0)
    document, chunk = (x.unsqueeze(-1) for x in (places.document, places.chunk))
    same = document == places.document[:, None, :-1]
    pairs = same & (chunk > places.chunk[:, None, :-1]) & places.valid.unsqueeze(1)
    mates = same & (chunk == places.chunk[:, None, :-1]) & places.valid.unsqueeze(1)

    opened = None if state is None else product(z, state.pending_dw.mT, z.dtype)
    scaled, opening = w, None
    if clip is not None:
        scaled, opening = _clipped(keys, w, clip, mates[:, :-1], opened, places, state)
    scores = product(z, keys.mT, z.dtype).masked_fill(~pairs[:, :-1], 0)
    change = product(scores, scaled, z.dtype)
    if state is not None and opened is not None:
        carried, still = _carried(places)
        past = opened if opening is None else opening * opened
        change = change + product(z, state.dw.mT, z.dtype).masked_fill(~carried[:, :-1], 0)
        change = change + past.masked_fill(~(carried & ~still)[:, :-1], 0)
    if document_ids is not None:
        # Masked, not multiplied by zero: a document with a NaN must not reach the next state.
        others = ~same[:, -1].unsqueeze(-1)
        keys, w, scaled = (x.masked_fill(others, 0) for x in (keys, w, scaled))
    dw = product((scaled * pairs[:, -1].unsqueeze(-1)).mT, keys, z.dtype)
    pending = product((w * mates[:, -1].unsqueeze(-1)).mT, keys, z.dtype)
    if state is not None:
        ends = document_ids is not None
        dw, pending = _add_carried(dw, pending, opening, places, state, ends)
    return change, InPlaceState(dw, pending, *places.after)


def _carried(places: Places) -> tuple[Tensor, Tensor]:
    """Tokens in the state's document, and those of them in its open chunk, bool `[B, T + 1, 1]`."""
    carried = places.document == 0
    still = carried & (places.chunk == 0)
    return carried.unsqueeze(-1), still.unsqueeze(-1)


def _add_carried(
    dw: Tensor,
    pending: Tensor,
    opening: Tensor | None,
    places: Places,
    state: InPlaceState,
    ends: bool,
) -> tuple[Tensor, Tensor]:
    """The next S and open chunk, from what the call adds to them and what the state holds.

    Args:
        dw: what the call adds to S.
        pending: what it adds to the open chunk.
        opening: factor of the state's open chunk, `[B, 1, 1]`; None: 1.
        places: of the call.
        state: before the call.
        ends: the state's document may have ended.
    """
    carried, still = (x[:, -1:] for x in _carried(places))
    own_dw, own_pending = state.dw, state.pending_dw
    if ends:
        own_dw, own_pending = (x.masked_fill(~carried, 0) for x in (own_dw, own_pending))
        opening = None if opening is None else opening.masked_fill(~carried, 0)
    closed = (~still).to(dw.dtype) if opening is None else opening * ~still
    dw = torch.addcmul(dw + own_dw, closed, own_pending)
    return dw, torch.addcmul(pending, still.to(dw.dtype), own_pending)


def _clipped(
    keys: Tensor,
    w: Tensor,
    clip: float | Tensor,
    mates: Tensor,
    opened: Tensor | None,
    places: Places,
    state: InPlaceState | None,
) -> tuple[Tensor, Tensor | None]:
    """`w` scaled by the factor of its chunk, and the factor of the state's open chunk `[B, 1, 1]`.

    With `G_ij = (w_i . w_j) (z_i . z_j)` the squared norm of `sum_i w_i z_i^T` is `sum_ij G_ij`,
    and of `P + sum_i w_i z_i^T` it is `||P||^2 + 2 sum_i w_i . P z_i + sum_ij G_ij`.
    """
    products = product(w, w.mT, w.dtype) * product(keys, keys.mT, w.dtype)
    products = products.masked_fill(~mates, 0).sum(-1, keepdim=True)
    square = products.mT.expand_as(mates).masked_fill(~mates, 0).sum(-1, keepdim=True)
    if state is None or opened is None:
        return w * _factor(square, clip), None
    first = places.valid & (places.document == 0)[:, :-1] & (places.chunk == 0)[:, :-1]
    others = ~first.unsqueeze(-1)
    crossed = (w * opened).sum(-1, keepdim=True).masked_fill(others, 0)
    carried = state.pending_dw.square().sum((1, 2)).view(-1, 1, 1)
    carried = carried + 2 * crossed.sum(1, keepdim=True)
    own = products.masked_fill(others, 0).sum(1, keepdim=True)
    square = square + carried.expand_as(square).masked_fill(others, 0)
    return w * _factor(square, clip), _factor(carried + own, clip)


def _factor(square: Tensor, clip: float | Tensor) -> Tensor:
    """What brings a matrix with this squared norm down to the largest norm."""
    return clip / square.clamp(min=clip**2).sqrt()
