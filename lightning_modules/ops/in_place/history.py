"""In-Place TTT without a matrix for every chunk: `Z (Z_prev^T V)`, masked to pairs that count."""

from torch import Tensor

from lightning_modules.ops.grid import Progress
from lightning_modules.ops.in_place.places import Places, find_places
from lightning_modules.ops.states import InPlaceState


def read_history(
    z: Tensor,
    w: Tensor,
    size: int,
    clip: float | None,
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

    opened = None if state is None else z @ state.pending_dw.mT
    scaled, opening = w, None
    if clip is not None:
        scaled, opening = _clipped(keys, w, clip, mates[:, :-1], opened, places, state)
    scores = (z @ keys.mT).masked_fill(~pairs[:, :-1], 0)
    change = scores @ scaled
    dw = (scaled * pairs[:, -1, :, None]).mT @ keys
    pending = (w * mates[:, -1, :, None]).mT @ keys
    if state is not None and opened is not None:
        carried = places.document == 0
        here, later = carried, carried & (places.chunk > 0)
        at = here.to(z.dtype).unsqueeze(-1)
        past = later.to(z.dtype).unsqueeze(-1)
        past = past if opening is None else past * opening
        change = change + at[:, :-1] * (z @ state.dw.mT) + past[:, :-1] * opened
        end, done = at[:, -1:], past[:, -1:]
        still = (carried & (places.chunk == 0))[:, -1, None, None]
        dw = dw + end * state.dw + done * state.pending_dw
        pending = pending + still * state.pending_dw
    return change, InPlaceState(dw, pending, *places.after)


def _clipped(
    keys: Tensor,
    w: Tensor,
    clip: float,
    mates: Tensor,
    opened: Tensor | None,
    places: Places,
    state: InPlaceState | None,
) -> tuple[Tensor, Tensor | None]:
    """`w` scaled by the factor of its chunk, and the factor of the state's open chunk `[B, 1, 1]`.

    With `G_ij = (w_i . w_j) (z_i . z_j)` the squared norm of `sum_i w_i z_i^T` is `sum_ij G_ij`,
    and of `P + sum_i w_i z_i^T` it is `||P||^2 + 2 sum_i w_i . P z_i + sum_ij G_ij`.
    """
    products = ((w @ w.mT) * (keys @ keys.mT)).masked_fill(~mates, 0).sum(-1, keepdim=True)
    square = mates.to(w.dtype) @ products
    if state is None or opened is None:
        return w * _factor(square, clip), None
    first = places.valid & (places.document == 0)[:, :-1] & (places.chunk == 0)[:, :-1]
    first = first.to(w.dtype).unsqueeze(-1)
    crossed = (w * opened).sum(-1, keepdim=True).masked_fill(first == 0, 0)
    carried = state.pending_dw.square().sum((1, 2)).view(-1, 1, 1)
    carried = carried + 2 * crossed.sum(1, keepdim=True)
    own = (products * first).sum(1, keepdim=True)
    return w * _factor(square + first * carried, clip), _factor(carried + own, clip)


def _factor(square: Tensor, clip: float) -> Tensor:
    """What brings a matrix with this squared norm down to the largest norm."""
    return clip / square.clamp(min=clip**2).sqrt()
