"""In-Place TTT whose rows are shared by the processes of a group: a scan over their sums.

S before a chunk is the sum of what the chunks before it add, so that every process p sums up its
own part of the row as if nothing came before, and an exclusive scan over the processes adds what
did. With A_p the sum of the own tokens of the chunk that is open where the part begins, M_p that of
the full chunks behind it, E_p that of the open one at the end:

    S_{p+1} = S_p + clip(E'_p + A_p) + M_p,   E'_{p+1} = E_p       if the part closes that chunk
    S_{p+1} = S_p,                            E'_{p+1} = E'_p + A_p   otherwise
    S_{p+1} = M_p,                            E'_{p+1} = E_p       if a document begins in the part

and a token of the part, as long as no document begins, gets `S_p z` more than from its own part,
and `clip(E'_p + A_p) z` behind the chunk that was open.
Source: "In-Place Test-Time Training", 2026, arXiv:2604.06169, section 3 (parallel scan).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from lightning_modules.ops.grid import Progress
from lightning_modules.ops.in_place.chunks import clipped
from lightning_modules.ops.in_place.places import Places, find_places
from lightning_modules.ops.processes import gather_flags, gather_from, own_part
from lightning_modules.ops.products import product
from lightning_modules.ops.states import InPlaceState


class Part(NamedTuple):
    """Where the own part of a row stands.

    Attributes:
        begin: the progress before it.
        end: the progress after the whole row.
        places: of the own tokens.
    """

    begin: Progress
    end: Progress
    places: Places

    @property
    def opening(self) -> Tensor:
        """Own tokens of the chunk that is open where the part begins, bool `[B, T]`."""
        document, chunk = self.places.document[:, :-1], self.places.chunk[:, :-1]
        return self.places.valid & (document == 0) & (chunk == 0)


def find_part(
    like: Tensor,
    size: int,
    mask: Tensor | None,
    document_ids: Tensor | None,
    before: Progress,
    group: ProcessGroup,
) -> Part:
    """Place the own part in the whole row, of which only mask and documents are exchanged.

    Args:
        like: any tensor `[B, T, ...]` on the device of the others.
        size: C.
        mask: of the own tokens, `[B, T]`, as are the documents; None on all processes or on none.
        document_ids: of the own tokens.
        before: the progress before the row.
        group: the processes.
    """
    batch, time = like.shape[:2]
    mask_of_row, ids_of_row = gather_flags(mask, document_ids, group)

    def after(length: int) -> Progress:
        read_mask, ids = (None if x is None else x[:, :length] for x in (mask_of_row, ids_of_row))
        row = like.new_empty(batch, length)
        return find_places(row, size, read_mask, ids, before).after if length else before

    begin = after(own_part(time, group).start)
    places = find_places(like, size, mask, document_ids, begin)
    return Part(begin, after(time * group.size()), places)


class Sums(NamedTuple):
    """What a part adds, `[B, D, F]` each, and two facts, bool `[B, 1, 1]`.

    Attributes:
        opening: A, what is added to the chunk that is open where the part begins, not clipped.
        full: M, of full chunks behind it.
        open: E, of the open chunk at the end, not clipped.
        closes: the part closes the chunk that is open where it begins.
        restarts: a document begins in it.
    """

    opening: Tensor
    full: Tensor
    open: Tensor
    closes: Tensor
    restarts: Tensor


def gather_sums(
    opening: Tensor, own: InPlaceState, places: Places, group: ProcessGroup
) -> list[Sums]:
    """The sums of all processes, in two messages.

    Args:
        opening: A.
        own: state after the own part, as if nothing came before.
        places: of the own tokens.
        group: the processes.
    """
    facts = torch.stack([places.chunk[:, -1] > 0, places.document[:, -1] > 0])
    known = gather_from(facts.byte(), group).bool()[..., None, None]
    matrices = gather_from(torch.stack([opening, own.dw, own.pending_dw]), group)
    pairs = zip(matrices.unbind(0), known.unbind(0), strict=True)
    return [Sums(*x.unbind(0), *y.unbind(0)) for x, y in pairs]


def scan(
    sums: list[Sums], dw: Tensor, pending: Tensor, clip: float | Tensor | None
) -> tuple[Tensor, Tensor]:
    """S and the open chunk before every part and after the last one, `[P + 1, B, D, F]` each.

    Args:
        sums: of the parts.
        dw: S before the row, `[B, D, F]`.
        pending: the open chunk before the row.
        clip: largest norm of what a chunk adds, or None.
    """
    totals, opens = [dw], [pending]
    for part in sums:
        together = opens[-1] + part.opening
        closed = torch.where(part.closes, clipped(together, clip), 0)
        ends = part.closes | part.restarts
        opens.append(torch.where(ends, part.open, together))
        totals.append(part.full + torch.where(part.restarts, 0, totals[-1] + closed))
    return torch.stack(totals), torch.stack(opens)


def add_before(change: Tensor, z: Tensor, dw: Tensor, closed: Tensor, places: Places) -> Tensor:
    """What the own part changes `[B, T, D]`, with what came before it.

    Args:
        change: of the own part.
        z: `[B, T, F]`.
        dw: S where the part begins, `[B, D, F]`.
        closed: what the chunk adds that is open there.
        places: of the own tokens.
    """
    carried = (places.document[:, :-1] == 0).unsqueeze(-1)
    behind = carried & (places.chunk[:, :-1] > 0).unsqueeze(-1)
    change = change + product(z, dw.mT, z.dtype).masked_fill(~carried, 0)
    return change + product(z, closed.mT, z.dtype).masked_fill(~behind, 0)
