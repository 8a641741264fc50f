"""LaCT by cuBLAS products with Triton kernels between them."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from lightning_modules.ops.lact import few
from lightning_modules.ops.lact.block import Triple
from lightning_modules.ops.lact.call import Call
from lightning_modules.ops.lact.carry import begin, end
from lightning_modules.ops.lact.chain import Chain
from lightning_modules.ops.lact.layout import Even, Uneven
from lightning_modules.ops.lact.memory import Memory, each, learned_memory
from lightning_modules.ops.lact.plan import plan
from lightning_modules.ops.lact.sizes import Sizes
from lightning_modules.ops.lact.stack import Form
from lightning_modules.ops.lact.walk import walk
from lightning_modules.ops.states import LaCTState, TokensRead
from lightning_modules.ops.ttt_eager import autocast_device


def triton_obstacle(lr: Tensor, group: ProcessGroup | None) -> str | None:
    """What the kernels cannot do of a call, with the fix; None if they can do it all."""
    if group is not None:
        return "it has a group, whose chunks are shared: use backend='torch'"
    if lr.dim() == 5:
        return (
            f"lr is per channel, {list(lr.shape)}: use one rate per head, [B, T, H, 3], or "
            "backend='torch'"
        )
    return None


def triton_lact(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    w0: Tensor,
    w1: Tensor,
    w2: Tensor,
    *,
    chunk_size: int,
    momentum: Tensor | None,
    muon: bool,
    muon_dtype: torch.dtype,
    prenorm: bool,
    residual: bool,
    greedy: bool,
    mask: Tensor | None,
    document_ids: Tensor | None,
    state: LaCTState | None,
    tokens_read: TokensRead | None,
    adapt: bool,
    recompute: bool,
    group: ProcessGroup | None,
) -> tuple[Tensor, LaCTState]:
    """LaCT by kernels; arguments and results are those of `ops.lact`.

    Products take their operands in the dtype of q; changes of the weights, and the weights, are
    float32. It keeps the weights of all chunks and no activation: `recompute` changes nothing.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    tokens = [k, v, lr] + ([] if momentum is None else [momentum.unsqueeze(-1)])
    with torch.autocast(autocast_device(q.device), enabled=False):
        layout = plan(q, chunk_size, mask, document_ids, state, tokens_read, adapt, group)
        assert isinstance(layout, Even | Uneven)  # Shared is an obstacle
        learned = learned_memory((w0, w1, w2), dtype, momentum is not None, prenorm)
        memory, held = begin(state, layout, learned, len(tokens))
        batch, _, heads, size = q.shape
        sizes = Sizes(batch, heads, w0.shape[2], size, q.dtype)
        call = Call(
            sizes,
            Form(w0.shape[2], residual, greedy, _is_small(q, chunk_size, len(w0), greedy)),
            walk(layout, batch, heads),
            chunk_size,
            muon_dtype if muon else None,
            prenorm,
            mask is not None,
            torch.is_grad_enabled(),
        )
        o, memory = _run(call, q, tokens, held, memory, learned, dtype)
        new = end(memory, learned, layout, tokens, held, lr.shape[3:], blank=mask is not None)
    return o, new


def _is_small(q: Tensor, chunk_size: int, blocks: int, greedy: bool) -> bool:
    """Whether chunks are written in few launches."""
    return (blocks == 1 or greedy) and len(q) * q.shape[2] * chunk_size <= few.ROWS


def _run(
    call: Call,
    q: Tensor,
    tokens: list[Tensor],
    held: list[Tensor] | None,
    memory: Memory,
    learned: Memory,
    dtype: torch.dtype,
) -> tuple[Tensor, Memory]:
    """The outputs, and the memory after the call."""
    sizes, changes = call.sizes, call.walk.changes
    k, v, *rates = tokens
    kept: list[Tensor | None] = [None] * 3
    if held is not None and call.walk.writes.number:
        first, second, *others = (x.to(dtype) for x in held)
        kept = [x.contiguous() for x in (first, second, torch.cat(others, dim=-1))]
    start = _pack(memory.weights, sizes)
    renewed = changes[-1].renewed if changes else None
    start_anew = anew_norms = None
    if renewed is not None:
        start_anew, anew_norms = _pack(learned.weights, sizes), _pack(learned.norms, sizes)
    o, *packed = Chain.apply(
        call,
        q,
        k,
        v,
        torch.cat([x.to(dtype) for x in rates], dim=-1),
        *kept,
        start,
        None if memory.main is None else _pack(memory.main, sizes),
        None if memory.momentum is None else _pack(memory.momentum, sizes),
        _pack(memory.norms, sizes),
        start_anew,
        anew_norms,
    )
    if not changes:
        return o, memory
    shapes = [w.shape[-2:] for w in memory.weights]
    after = [None if x is None else _unpack(x, shapes, sizes) for x in packed]
    norms = memory.norms
    if renewed is not None:
        norms = each(lambda a, b: torch.where(renewed.view(-1, 1, 1), a, b), learned.norms, norms)
    assert after[0] is not None
    return o, Memory(after[0], after[1], after[2], norms)


def _pack(triple: Triple, sizes: Sizes) -> Tensor:
    """W0, W1, W2 `[r, H, B or 1, ., .]` as rows W0, W2, W1, `[r, G, .]`."""
    first, last, second = (w.flatten(3) for w in triple)
    packed = torch.cat([first, second, last], dim=-1)
    return packed.expand(-1, -1, sizes.batch, -1).flatten(1, 2).contiguous()


def _unpack(packed: Tensor, shapes: list[torch.Size], sizes: Sizes) -> Triple:
    """The inverse, for W0, W1, W2 of these shapes."""
    first, last, second = shapes
    parts = packed.split([shape.numel() for shape in (first, second, last)], dim=-1)
    w0, w2, w1 = (
        x.unflatten(-1, shape).unflatten(1, (sizes.heads, sizes.batch))
        for x, shape in zip(parts, (first, second, last), strict=True)
    )
    return w0, w1, w2
