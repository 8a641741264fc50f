"""Chapter attention's kernels as one differentiable function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_modules.ops.chapter_attention.groups import Groups, group_width, sorted_groups
from lightning_modules.ops.chapter_attention.plan import Plan, Tile, plan_of
from lightning_modules.ops.tile_size import padded
from lightning_modules.ops.ttt_eager import refuse_second_derivatives


class Call(NamedTuple):
    """What the kernels are told beside tensors.

    Attributes:
        time: T, tokens of a row of the batch.
        block: tokens of a block, at most T.
        scale: of the logits.
        mixture: whether every chapter has its own softmax.
        by_block: whether queries are read by block (joint mixing only), or by chapter.
    """

    time: int
    block: int
    scale: float
    mixture: bool
    by_block: bool


class Inputs(NamedTuple):
    """Tensors of a call, contiguous; q, keys and values in one dtype.

    Attributes:
        q: `[tokens, H, D]`.
        mem_k: `[C, R, Hkv, D]`.
        mem_v: of the same shape.
        log_weights: `[B, blocks, k]` in the dtype of the softmax.
        chapters: of the same shape, int32.
    """

    q: Tensor
    mem_k: Tensor
    mem_v: Tensor
    log_weights: Tensor
    chapters: Tensor


class Read(torch.autograd.Function):
    """`o [tokens, H, D]` and lse: of tokens, `[tokens, H]`, or of a mixture's parts,

    `[tokens k, H]`, without a gradient. Differentiable once.
    """

    @staticmethod
    def forward(ctx: Any, call: Call, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        o, lse, *groups = forward(call, Inputs(*inputs))
        if call.mixture:
            ctx.mark_non_differentiable(lse)
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, None if call.mixture else o, lse, *groups)
        return o, lse

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives("chapter_attention", "triton")
        saved = ctx.saved_tensors
        grads = backward(ctx.call, Inputs(*saved[:5]), saved[5], saved[6], saved[7:], do, dlse)
        return None, *grads, None


def forward(call: Call, x: Inputs) -> tuple[Tensor, ...]:
    """Output and lse as of `Read`, and the groups if queries are read by chapter."""
    with torch.cuda.device_of(x.q):
        if call.by_block:
            return read_blocks(call, x)
        groups = groups_of(call, x)
        parts = read_pairs(call, x, groups)
        o, lse = merge(call, x, *parts)
    return o, parts[1] if call.mixture else lse, *groups


def room_forward(call: Call, x: Inputs) -> tuple[Tensor, ...]:
    """Room for what `forward` returns."""
    groups = () if call.by_block else groups_of(call, x)
    return torch.empty_like(x.q), _scalars(x, x.chapters.shape[-1] if call.mixture else 1), *groups


def backward(
    call: Call,
    x: Inputs,
    o: Tensor | None,
    lse: Tensor,
    kept: Sequence[Tensor],
    do: Tensor | None,
    dlse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the inputs but the chapters.

    Args:
        call: of the forward pass.
        x: its inputs.
        o: its output; None for a mixture.
        lse: its other one.
        kept: its groups, if there were some.
        do: gradient of the output; None: zero.
        dlse: of lse, likewise; not looked at for a mixture.
    """
    do = torch.zeros_like(x.q) if do is None else do.contiguous()
    with torch.cuda.device_of(x.q):
        groups = Groups(*kept) if kept else groups_of(call, x)
        if call.mixture:  # parts are as large as k outputs: read again rather than kept
            o = read_pairs(call, x, groups)[0]
        assert o is not None
        delta = deltas(x, o, do, None if call.mixture or dlse is None else dlse.contiguous())
        dk, dv, dq, by_part = bank_gradients(call, x, groups, lse, do, delta)
        if dq is None or by_part is None:
            dq, dlog = query_gradients(call, x, lse, do, delta)
        elif call.mixture:
            dlog = sum_by_block(call, x, delta) * x.log_weights.exp()
        else:
            dlog = sum_by_block(call, x, by_part)
    return dq, dk, dv, dlog


def groups_of(call: Call, x: Inputs) -> Groups:
    """Pairs of a call by chapter."""
    chapters, (num_chapters, _, kv_heads, _) = x.chapters.flatten(), x.mem_k.shape
    slots = group_width(chapters.numel() * call.block, num_chapters, kv_heads)
    return sorted_groups(chapters, num_chapters, max(1, slots // call.block))


def read_blocks(call: Call, x: Inputs) -> tuple[Tensor, Tensor]:
    """Outputs and lse, by block."""
    from lightning_modules.ops.chapter_attention.kernels.forward import read_blocks_kernel

    plan, o, lse = _plan(call, x).read_blocks, torch.empty_like(x.q), _scalars(x, 1)
    read_blocks_kernel[(_tiles(call, x, plan) * x.q.shape[1],)](
        *(*x, o, lse), **_sizes(call, x), **_options(call, x, plan)
    )
    return o, lse


def read_pairs(call: Call, x: Inputs, groups: Groups) -> tuple[Tensor, Tensor]:
    """Outputs `[tokens k, H, D]` and lse `[tokens k, H]` of parts, by chapter."""
    from lightning_modules.ops.chapter_attention.kernels.forward import read_pairs_kernel

    (tokens, heads, size), choices = x.q.shape, x.chapters.shape[-1]
    parts, lse = x.q.new_empty(tokens * choices, heads, size), _scalars(x, choices)
    read_pairs_kernel[(len(groups.chapter) * heads,)](
        *(x.q, x.mem_k, x.mem_v, *groups[:4], parts, lse),
        BY_TOKEN=call.block == 1,
        **_sizes(call, x),
        **_options(call, x, _plan(call, x).read_pairs),
    )
    return parts, lse


def merge(call: Call, x: Inputs, parts: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs and (joint) lse of tokens."""
    from lightning_modules.ops.chapter_attention.kernels.forward import merge_kernel

    o, lse, rows = torch.empty_like(x.q), _scalars(x, 1), x.q.shape[0] * x.q.shape[1]
    sizes, plan = _sizes(call, x), _plan(call, x).merge
    del sizes["KV"]
    merge_kernel[(-(-rows // plan.queries),)](
        *(parts, part_lse, x.log_weights, o, lse),
        **{**sizes, "rows_of_output": rows, "K": x.chapters.shape[-1]},
        MIXTURE=call.mixture,
        **_row_options(x, plan),
    )
    return o, lse


def deltas(x: Inputs, o: Tensor, do: Tensor, dlse: Tensor | None) -> Tensor:
    """`<do, o> - dlse` of outputs or parts."""
    from lightning_modules.ops.chapter_attention.kernels.backward import delta_kernel

    (tokens, heads, _), parts = x.q.shape, len(o) // len(x.q)
    delta, plan = _scalars(x, parts), plan_of(x.q, x.mem_k, 1).merge
    delta_kernel[(-(-tokens * heads // plan.queries),)](
        *(o, do, dlse, delta, tokens * heads, heads),
        J=parts,
        HAS_DLSE=dlse is not None,
        **_row_options(x, plan),
    )
    return delta


def query_gradients(
    call: Call, x: Inputs, lse: Tensor, do: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of queries and log weights, by block."""
    from lightning_modules.ops.chapter_attention.kernels.backward import query_gradient_kernel

    plan, heads = _plan(call, x).query_gradient, x.q.shape[1]
    tiles, dq = _tiles(call, x, plan), torch.empty_like(x.q)
    pieces = -(-x.mem_k.shape[1] // plan.rows)
    shape = (*x.chapters.shape[:2], -1, heads, x.chapters.shape[2], pieces)
    dlog = lse.new_empty(tiles * heads * x.chapters.shape[2] * pieces).view(shape)
    query_gradient_kernel[(tiles * heads,)](
        *(*x, lse, do, delta, dq, dlog), **_sizes(call, x), **_options(call, x, plan)
    )
    return dq, dlog.sum((2, 3, 5))


def bank_gradients(
    call: Call, x: Inputs, groups: Groups, lse: Tensor, do: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of keys and values, by chapter, and unless queries are read by block also those of

    queries and of log weights, the latter by part, `[tokens k, H]`.
    """
    from lightning_modules.ops.chapter_attention.kernels import backward

    plan, (_, rows, kv_heads, _) = _plan(call, x), x.mem_k.shape
    tiles, (tokens, heads, size) = -(-rows // plan.bank_gradient.rows), x.q.shape
    sums = [lse.new_empty(len(groups.chapter), *x.mem_k.shape[1:]) for _ in "kv"]
    dq = dlog = None
    if not call.by_block:
        dq = x.q.new_empty(tokens, x.chapters.shape[-1], heads, size)
        dlog = lse.new_empty(tokens * x.chapters.shape[-1], heads)
    given = (*x[:4], *groups[:4], lse, do, delta)
    common = {"BY_TOKEN": call.block == 1, "BY_PART": call.mixture, **_sizes(call, x)}
    backward.bank_gradient_kernel[(len(groups.chapter) * kv_heads, tiles)](
        *(*given, *sums, dq, dlog),
        WITH_QUERIES=dq is not None and tiles == 1,
        **common,
        **_options(call, x, plan.bank_gradient),
    )
    if dq is not None and tiles > 1:
        backward.pair_gradient_kernel[(len(groups.chapter) * heads,)](
            *(*given, dq, dlog), **common, **_options(call, x, plan.pair_gradient)
        )
    dk, dv = (add_groups(y, groups, x.mem_k) for y in sums)
    return dk, dv, None if dq is None else dq.sum(1), dlog


def add_groups(sums: Tensor, groups: Groups, mem: Tensor) -> Tensor:
    """Sums of groups `[N, R, Hkv, D]` by chapter, in their order."""
    from lightning_modules.ops.chapter_attention.kernels.backward import sum_groups_kernel

    out, numbers = torch.empty_like(mem), sums[0].numel()
    sum_groups_kernel[(len(mem), -(-numbers // 1024))](
        sums, groups.start, out, numbers, BE=1024, num_warps=4
    )
    return out


def sum_by_block(call: Call, x: Inputs, by_part: Tensor) -> Tensor:
    """What parts `[tokens k, H]` have together in a block, `[B, blocks, k]`."""
    batch, blocks, choices = x.chapters.shape
    by_token = by_part.sum(-1).view(batch, call.time, choices)
    if call.block == 1:
        return by_token
    padded = torch.nn.functional.pad(by_token, (0, 0, 0, blocks * call.block - call.time))
    return padded.view(batch, blocks, call.block, choices).sum(2)


def _scalars(x: Inputs, parts: int) -> Tensor:
    """A number of the softmax's dtype for each head and part of a token."""
    return x.log_weights.new_empty(x.q.shape[0] * parts, x.q.shape[1])


def _plan(call: Call, x: Inputs) -> Plan:
    return plan_of(x.q, x.mem_k, call.block)


def _tiles(call: Call, x: Inputs, plan: Tile) -> int:
    """Tiles of tokens, each of one block."""
    batch, blocks, _ = x.chapters.shape
    return batch * blocks * -(-call.block // plan.queries)


def _sizes(call: Call, x: Inputs) -> dict[str, int]:
    return {
        "T": call.time,
        "block": call.block,
        "blocks": x.chapters.shape[1],
        "H": x.q.shape[1],
        "KV": x.mem_k.shape[2],
    }


def _options(call: Call, x: Inputs, plan: Tile) -> dict[str, Any]:
    """What the kernels of tiles are compiled for."""
    return {
        "K": x.chapters.shape[-1],
        "R": x.mem_k.shape[1],
        "BR": plan.rows,
        "SCALE": call.scale,
        "PRECISION": "tf32x3" if x.q.dtype == torch.float32 else "ieee",
        "num_stages": plan.stages,
        **_row_options(x, plan),
    }


def _row_options(x: Inputs, plan: Tile) -> dict[str, Any]:
    size = x.q.shape[-1]
    return {"D": size, "BM": plan.queries, "BD": padded(size), "num_warps": plan.warps}
