"""In-Place TTT by matrix products, in one of two forms that are chosen from the sizes alone.

`chunks` makes the change S_i of every chunk, an exclusive prefix sum of `eta V^T Z`, and reads each
chunk with its own: two products with D F operations per token, but N matrices of the size of W.

`history` never makes them: what earlier chunks of the same piece of L tokens add to an output is

    sum_{j in earlier chunks} (z_t . z_j) eta_j v_j        ("Z (Z_prev^T V)")

with L (D + F) operations per token. Which pairs count is a mask, so that any mix of documents,
masked tokens and open chunks has the same shapes; only between pieces is S made. It is taken for
such a mix, for calls shorter than a chunk (one token at a time above all), and for chunks so small
that a matrix for each would be larger than its tokens.

Neither form waits for the device. Products of bfloat16 inputs are of bfloat16 numbers (what is read
of the state is rounded to them) and accumulated in float32; everything else, the state first of
all, is float32. In single tokens' calls, which only read the state, products are float32 as well.
"""

from functools import partial

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import linear

from lightning_modules.ops.grid import Progress
from lightning_modules.ops.in_place.chunks import clipped, read_chunks
from lightning_modules.ops.in_place.history import read_history
from lightning_modules.ops.in_place.shared import Part, add_before, find_part, gather_sums, scan
from lightning_modules.ops.products import product
from lightning_modules.ops.states import InPlaceState
from lightning_modules.ops.ttt_eager import autocast_device

LARGE = 2
"""How many times larger than a chunk's tokens, D F over C (D + F), its matrix may be. Measured on
one core with D = 576, F = 1536, T = 1024, backward included: the forms are equal at 2 to 3."""

SHORTEST = 64
"""Least tokens of a piece: below it a product costs no more for more of them."""


def eager_in_place(
    z: Tensor,
    v: Tensor,
    w_down: Tensor,
    eta: float | Tensor,
    *,
    chunk_size: int,
    clip: float | Tensor | None,
    mask: Tensor | None,
    document_ids: Tensor | None,
    state: InPlaceState | None,
    group: ProcessGroup | None,
    part: Part | None,
) -> tuple[Tensor, InPlaceState]:
    """In-Place TTT by matrix products; arguments and results are those of `ops.in_place`."""
    base, wide = linear(z, w_down), torch.promote_types(z.dtype, torch.float32)
    narrow = z.dtype == v.dtype == torch.bfloat16 and z.shape[1] >= SHORTEST
    dtype = z.dtype if narrow else wide
    with torch.autocast(autocast_device(z.device), enabled=False):
        z, w = z.to(dtype), _scaled(v.to(dtype), eta)
        if state is not None:
            changes = {name: getattr(state, name).to(wide) for name in ("dw", "pending_dw")}
            state = state._replace(**changes)
        read = _read if group is None else partial(_read_shared, group, part)
        change, after = read(z, w, chunk_size, clip, mask, document_ids, state)
    return (base + change).to(base.dtype), after


def _read(
    z: Tensor,
    w: Tensor,
    chunk_size: int,
    clip: float | Tensor | None,
    mask: Tensor | None,
    document_ids: Tensor | None,
    state: InPlaceState | None,
) -> tuple[Tensor, InPlaceState]:
    """What S adds to the outputs, `[B, T, D]`, and the state after the call."""
    if mask is None and document_ids is None and _makes_matrices(z, w, chunk_size):
        return read_chunks(z, w, chunk_size, clip, state)
    return _read_pieces(z, w, chunk_size, clip, mask, document_ids, state)


def _read_shared(
    group: ProcessGroup,
    part: Part | None,
    z: Tensor,
    w: Tensor,
    chunk_size: int,
    clip: float | Tensor | None,
    mask: Tensor | None,
    document_ids: Tensor | None,
    state: InPlaceState | None,
) -> tuple[Tensor, InPlaceState]:
    """As `_read`, of the own part of rows that the processes of the group share."""
    if part is None:
        part = find_part(z, chunk_size, mask, document_ids, Progress.of(state, z), group)
    wide = torch.promote_types(z.dtype, torch.float32)
    fresh = z.new_zeros(len(z), w.shape[-1], z.shape[-1], dtype=wide)
    dw, pending = (fresh, fresh) if state is None else (state.dw, state.pending_dw)
    opening = part.opening.unsqueeze(-1)
    opens = product(w.masked_fill(~opening, 0).mT, z.masked_fill(~opening, 0), z.dtype)
    own = InPlaceState(fresh, fresh, *part.begin)
    behind = w.masked_fill(opening, 0)
    change, own = _read(z, behind, chunk_size, clip, mask, document_ids, own)
    sums = gather_sums(opens, own, part.places, group)
    totals, open_chunks = scan(sums, dw, pending, clip)
    before, closed = totals[group.rank()], clipped(open_chunks[group.rank()] + opens, clip)
    change = add_before(change, z, before, closed, part.places)
    return change, InPlaceState(totals[-1].clone(), open_chunks[-1].clone(), *part.end)


def _scaled(v: Tensor, eta: float | Tensor) -> Tensor:
    """`eta v`, `[B, T, D]`."""
    if not isinstance(eta, Tensor):
        return v * eta
    eta = eta.to(v.dtype)
    return v * (eta.unsqueeze(-1) if eta.dim() else eta)


def _makes_matrices(z: Tensor, v: Tensor, chunk_size: int) -> bool:
    """Whether `chunks` is the cheaper form of a call without masks and documents."""
    hidden, size = z.shape[-1], v.shape[-1]
    matrix, tokens = hidden * size, chunk_size * (hidden + size)
    return z.shape[1] >= chunk_size and matrix <= LARGE * tokens


def _read_pieces(
    z: Tensor,
    w: Tensor,
    chunk_size: int,
    clip: float | Tensor | None,
    mask: Tensor | None,
    document_ids: Tensor | None,
    state: InPlaceState | None,
) -> tuple[Tensor, InPlaceState]:
    """`read_history` in pieces whose pairs cost at most about one product with S."""
    hidden, size = z.shape[-1], w.shape[-1]
    length = max(hidden * size // (hidden + size), SHORTEST)
    parts: list[Tensor] = []
    for start in range(0, z.shape[1], length):
        piece = slice(start, start + length)
        own_mask, own_ids = (None if x is None else x[:, piece] for x in (mask, document_ids))
        part, state = read_history(
            z[:, piece], w[:, piece], chunk_size, clip, own_mask, own_ids, state
        )
        parts.append(part)
    assert state is not None, "a call has at least one token"
    return torch.cat(parts, dim=1), state
