"""In-Place TTT over rows that processes share: what a part needs of the tokens before it.

The convolution reads targets of its chunk across the border of two parts, so that a part begins
with the last `K - 1` targets before it. If the convolution sees h later tokens, the values of the
last h tokens of an open chunk are not known where their part ends: they are held, and the next
part writes them. Both is what a later call needs of an earlier one (`in_place_stream`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from lightning_modules.layers.chunk_conv import ChunkConv
from lightning_modules.layers.in_place_stream import InPlaceMLPState, Reading
from lightning_modules.layers.token_parts import find_parts, newest_tokens, only_newest
from lightning_modules.ops.grid import Progress
from lightning_modules.ops.in_place.places import find_places
from lightning_modules.ops.in_place.shared import Part, find_part
from lightning_modules.ops.states import InPlaceState


class SharedStream(NamedTuple):
    """The own part of rows.

    Attributes:
        before: state with which it begins; S and the open chunk in it are those before the rows.
        end: the progress after the rows.
        targets: the last targets after the rows, as in `InPlaceMLPState`.
        held: likewise.
    """

    before: InPlaceMLPState
    end: Progress
    targets: Tensor
    held: Tensor


def share_stream(
    targets: Tensor,
    z: Tensor,
    conv: ChunkConv,
    size: int,
    mask: Tensor | None,
    document_ids: Tensor | None,
    state: InPlaceMLPState,
    group: ProcessGroup,
) -> SharedStream:
    """Tell the other parts the last tokens of the own one.

    Args:
        targets: own, `[B, T, D]`.
        z: own, `[B, T, F]`.
        conv: the convolution.
        size: tokens of a chunk.
        mask: of the own tokens, as are the documents.
        document_ids: None on all processes or on none.
        state: before the rows.
        group: the processes.
    """
    parts = find_parts(targets, mask, document_ids, state, group)
    part = find_part(targets, size, mask, document_ids, Progress.of(state, z), group)
    targets_before, targets_after = newest_tokens(targets, state.targets, parts)
    held_before, held_after = newest_tokens(z, state.held, parts)
    pending = part.end.pending_count
    return SharedStream(
        InPlaceMLPState(state.dw, state.pending_dw, targets_before, held_before, *part.begin),
        part.end,
        only_newest(targets_after, pending),
        only_newest(held_after, pending.clamp(max=conv.future)),
    )


def fresh_state(targets: Tensor, z: Tensor, conv: ChunkConv) -> InPlaceMLPState:
    """The state of rows that have read nothing."""
    batch, _, size = targets.shape
    dtype = torch.promote_types(z.dtype, torch.float32)
    dw = z.new_zeros(batch, size, z.shape[2], dtype=dtype)
    kept = z.new_zeros(batch, conv.kernel_size - 1, size, dtype=dtype)
    held = z.new_zeros(batch, conv.future, z.shape[2], dtype=dtype)
    return InPlaceMLPState(dw, dw, kept, held, *Progress.of(None, z))


def part_of(reading: Reading, size: int, stream: SharedStream) -> Part:
    """Where the tokens of `reading` stand, held ones first."""
    state = reading.state
    assert isinstance(state, InPlaceState), "a part goes on from a state"
    begin = Progress(*state[2:])
    places = find_places(reading.z, size, reading.mask, reading.document_ids, begin)
    return Part(begin, stream.end, places)
