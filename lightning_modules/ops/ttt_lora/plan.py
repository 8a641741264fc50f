"""Where the blocks of a call lie, for the Triton kernels: made once, shared by all adapters."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_modules.ops.grid import Progress, document_starts
from lightning_modules.ops.tile_size import padded


class Plan(NamedTuple):
    """Blocks of the rows of a call; without mask and documents a block is a mini-batch.

    Attributes:
        blocks: at most so many in a row.
        slots: at most so many in a row need a change of the weights to be kept.
        tile: M, tokens that a block has room for, a power of two.
        entries: start, stop, flags, tokens before and slot of each, int32 `[B, blocks, 5]`; None
            without mask and documents.
        rows: number of blocks and the first one that stays open, int32 `[B, 2]`; None likewise.
        mask: uint8 `[B, T]`; None: all tokens exist.
        progress: after the call; None where the scan counts for itself.
    """

    blocks: int
    slots: int
    tile: int
    entries: Tensor | None
    rows: Tensor | None
    mask: Tensor | None
    progress: Progress | None


def make_plan(
    time: int,
    size: int,
    mask: Tensor | None,
    document_ids: Tensor | None,
    progress: Progress | None,
) -> Plan:
    """The plan of a call, without waiting for the device.

    Args:
        time: T.
        size: m.
        mask: bool `[B, T]`; None: all tokens exist.
        document_ids: `[B, T]`; None: one document.
        progress: of the state; None: there is none.
    """
    tile = padded(size)
    full = -(-(time + (size - 1 if progress is not None else 0)) // size)
    if mask is None and document_ids is None:
        return Plan(full, full, tile, None, None, None, None)
    like = mask if mask is not None else document_ids
    assert like is not None
    before = progress if progress is not None else Progress.of(None, like)
    valid = mask if mask is not None else torch.ones_like(like, dtype=torch.bool)
    starts, after = document_starts(valid, valid.cumsum(1) - 1, document_ids, before)
    slots = full + time // tile + 1
    blocks = time if document_ids is not None else min(time, slots)
    there = _bytes(valid)
    features = [mask is not None, document_ids is not None, progress is not None]
    lay_out = _lay_out_in_graph if torch.compiler.is_compiling() else _lay_out
    entries, rows, count = lay_out(
        there,
        _bytes(starts),
        before.pending_count,
        [blocks, size, tile],
        features,
    )
    after = after._replace(pending_count=count)
    return Plan(blocks, slots, tile, entries, rows, there if mask is not None else None, after)


def _bytes(flags: Tensor) -> Tensor:
    """Booleans as numbers; the view costs nothing, but torch 2.11 cannot trace it."""
    flags = flags.contiguous()
    return flags.to(torch.uint8) if torch.compiler.is_compiling() else flags.view(torch.uint8)


def _lay_out(
    there: Tensor, starts: Tensor, pending: Tensor, sizes: Sequence[int], features: Sequence[bool]
) -> list[Tensor]:
    """Entries and rows of a plan, and the tokens of the open mini-batch, int64 `[B]`."""
    from lightning_modules.ops.ttt_lora.kernels.plan import plan_kernel

    (blocks, size, tile), (masked, documents, state) = sizes, features
    results = _room(there, starts, pending, sizes, features)
    plan_kernel[(len(there),)](
        there,
        starts,
        pending,
        *results,
        there.shape[1],
        blocks,
        SIZE=size,
        M=tile,
        MASKED=masked,
        DOCUMENTS=documents,
        STATE=state,
        num_warps=1,
    )
    return results


def _room(
    there: Tensor, starts: Tensor, pending: Tensor, sizes: Sequence[int], features: Sequence[bool]
) -> list[Tensor]:
    batch, new = len(there), there.new_empty
    entries, rows = new(batch, sizes[0], 5, dtype=torch.int32), new(batch, 2, dtype=torch.int32)
    return [entries, rows, new(batch, dtype=torch.int64)]


_lay_out_in_graph = torch.library.custom_op(
    "fast_weights::ttt_lora_plan", _lay_out, mutates_args=()
)
_lay_out_in_graph.register_fake(_room)
