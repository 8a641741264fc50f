"""In-Place TTT with a matrix for every chunk: an exclusive prefix sum of what the chunks add."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_modules.ops.grid import MoveRows, Progress, inverse
from lightning_modules.ops.in_place.prefix import Prefix
from lightning_modules.ops.products import product
from lightning_modules.ops.states import InPlaceState


def read_chunks(
    z: Tensor, w: Tensor, size: int, clip: float | Tensor | None, state: InPlaceState | None
) -> tuple[Tensor, InPlaceState]:
    """What S adds to the outputs of tokens that all exist and belong to one document.

    Args:
        z: `[B, T, F]`.
        w: `eta v`, `[B, T, D]`.
        size: C.
        clip: largest norm of what a chunk adds, or None.
        state: before the call; None: fresh.

    Returns:
        `S_i z_t`, `[B, T, D]`, and the state after the call.
    """
    time, before = z.shape[1], Progress.of(state, z)
    count = before.pending_count
    if state is None:
        z_, w_, dw, opened = _cut(z, size), _cut(w, size), None, None
    else:
        slot, token = _slots(count, time, _up_to(time + size - 1, size))
        z_, w_ = (_move(x, token, slot).unflatten(1, (-1, size)) for x in (z, w))
        dw, opened = state.dw, state.pending_dw
    adds = product(w_.mT, z_, z.dtype)
    place = torch.arange(adds.shape[1], device=z.device)
    full = ((count + time) // size).unsqueeze(1)
    closed, still = place < full, place == full
    totals, dw, pending = Prefix.apply(adds, dw, opened, clip, closed, still, time // size)
    read = product(z_, totals.mT, z.dtype).flatten(1, 2)
    change = read[:, :time] if state is None else _move(read, slot, token)
    seen, document = before.tokens_seen + time, before.document_id
    return change, InPlaceState(dw, pending, (count + time) % size, seen, document)


def clipped(adds: Tensor, clip: float | Tensor | None) -> Tensor:
    """Matrices scaled down to the largest norm, `[..., D, F]`; exact gradients, also at zero."""
    if clip is None:
        return adds
    norm = torch.linalg.matrix_norm(adds, keepdim=True)
    return adds * (clip / norm.clamp(min=clip))


def _cut(x: Tensor, size: int) -> Tensor:
    """Tokens `[B, T, E]` as chunks `[B, N, C, E]`, empty slots 0."""
    return pad(x, (0, 0, 0, -x.shape[1] % size)).unflatten(1, (-1, size))


def _up_to(length: int, size: int) -> int:
    """The next multiple of the size."""
    return -(-length // size) * size


def _slots(count: Tensor, time: int, length: int) -> tuple[Tensor, Tensor]:
    """Slot of each token, `[B * T]`, and the token in each slot, -1 if empty, `[B * length]`."""
    row = torch.arange(len(count), device=count.device).unsqueeze(1)
    place = torch.arange(time, device=count.device)
    slot = (row * length + count.unsqueeze(1) + place).flatten()
    return slot, inverse(slot, len(count) * length)


def _move(x: Tensor, index: Tensor, back: Tensor) -> Tensor:
    """Rows of `[B, S, E]` at the indices, `[B, S', E]`."""
    batch, _, inner = x.shape
    return MoveRows.apply(x.reshape(-1, inner), index, back).view(batch, -1, inner)
