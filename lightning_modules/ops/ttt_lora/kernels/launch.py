"""Buffers and launches of the Triton kernels of TTT-as-LoRA."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from lightning_modules.ops.launcher import Launcher, Options, given
from lightning_modules.ops.tile_size import padded
from lightning_modules.ops.ttt_lora.call import Call, held_get_gradients
from lightning_modules.ops.ttt_lora.kernels.backward import (
    read_backward_kernel,
    scan_backward_kernel,
)
from lightning_modules.ops.ttt_lora.kernels.forward import read_kernel, scan_kernel
from lightning_modules.ops.ttt_lora.kernels.tokens import (
    pending_backward_kernel,
    token_backward_kernel,
)

Given = Sequence[Tensor | None]

scan, read = Launcher(scan_kernel), Launcher(read_kernel)
scan_backward, read_backward = Launcher(scan_backward_kernel), Launcher(read_backward_kernel)
token_backward, pending_back = Launcher(token_backward_kernel), Launcher(pending_backward_kernel)


def forward(
    call: Call,
    before: Given,
    eta: Tensor,
    base: Tensor,
    start: Tensor | None,
    pending: Given,
    norm: Tensor | None,
    output_norm: Tensor | None,
    tokens: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """What `_Fused` returns: the fields of `Result`, and the changes kept for backward."""
    q, k, v = split(tokens, base)
    batch, time, group, _ = q.shape
    eta, plan = eta.expand(batch, time, group), call.plan
    results = room_forward(call, base, tokens)
    o, change, open_k, open_v, open_eta, progress, kept, kept_open = results
    numbers = (*strides(q, eta), time, plan.blocks, plan.slots, group, call.eps)
    features = (norm is not None, start is not None)
    entries, rows, mask = given((plan.entries, plan.rows, plan.mask), k)
    first, held_k, held_v, held_eta, count, seen, documents, inside, behind = given(
        (start, *pending, *before, norm, output_norm), k
    )
    with on_device(q):
        scan(
            (batch * group, 1, 1),
            (k, v, eta, base, first, held_k, held_v, held_eta, count, seen, documents, inside,
             entries, rows, mask, kept, kept_open, change, open_k, open_v, open_eta, progress),
            numbers,
            options(call, base, SCANNING, *features),
        )  # fmt: skip
        read(
            (plan.blocks, batch * group, 1),
            (q, k, v, eta, base, count, inside, behind, entries, rows, mask, kept, kept_open, o),
            (*numbers, call.output_eps),
            options(call, base, READING, *features, **output_options(call, output_norm)),
        )
    return results


def room_forward(call: Call, base: Tensor, tokens: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Room for what `forward` returns."""
    (batch, time), (group, _, d) = tokens[0].shape[:2], base.shape
    exact, new = base.new_empty, tokens[0].new_empty
    kept = exact(batch, group, call.plan.slots, d + 1, d)
    kept_open = torch.empty_like(kept) if call.mode_b else exact(0)
    change, o = exact(batch, group, d + 1, d), new(batch, time, group, call.width)
    open_k, open_v = (exact(batch, call.size, group, d) for _ in "kv")
    open_eta = exact(batch, call.size, group)
    progress = new(3, batch, dtype=torch.int64)
    return o, change, open_k, open_v, open_eta, progress, kept, kept_open


def backward(
    call: Call, before: Given, inputs: Given, kept: Given, grads: Given, of_state: bool
) -> Given:
    """Gradients of the inputs of `_Fused` from `eta` on.

    Args:
        call: of the forward pass.
        before: the state's integers.
        inputs: of the forward pass.
        kept: by it.
        grads: of outputs, the change, the open mini-batch; None: zero.
        of_state: whether the gradients of the state are asked for.
    """
    rates, base, start, *pending, norm, output_norm = inputs[:8]
    tokens = [x for x in inputs[8:] if x is not None]
    assert rates is not None and base is not None
    q, k, v = split(tokens, base)
    batch, time, group, d = q.shape
    eta, per_token = rates.expand(batch, time, group), rates.dim() == 3
    plan, rows, exact = call.plan, batch * group, base.new_empty
    blocks, matrix = plan.blocks, (d + 1, d)
    grad_o, change, *opened = of_outputs(call, grads, q, base)
    reads, pulls = (exact(batch, group, blocks, *matrix) for _ in "rp")
    of_error = exact(q.shape) if call.mode_b else exact(0)
    of_pending, of_base, of_start = (exact(batch, group, *matrix) for _ in "pbs")
    features, outputs = (norm is not None, start is not None), output_options(call, output_norm)
    numbers = (*strides(q, eta), time, blocks, plan.slots, group, call.eps)
    around = given((before[0], norm, output_norm, plan.entries, plan.rows, plan.mask), k)
    new = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tokens]
    of_eta = exact(batch, time, group) if per_token else base
    of_held: Given = (None, None, None)
    held = held_get_gradients(start, norm, of_state)
    sums, sizes = room_for_sums(base, rows, blocks, (norm, output_norm), per_token, held)
    of_q, of_k, of_v = split(new, base)
    with on_device(q):
        read_backward(
            (blocks, rows, 1),
            (q, k, v, eta, base, *around, *kept, grad_o, reads, of_error),
            (*numbers, call.output_eps),
            options(call, base, READING, *features, **outputs),
        )
        scan_backward(
            (rows, 1, 1),
            (k, v, eta, base, *given((start, *pending, before[0], norm), k), *around[3:], kept[0],
             *given((change,), k), reads, of_error, pulls, of_pending, of_base, of_start),
            numbers,
            options(call, base, SCANNING, *features, FINAL=change is not None),
        )  # fmt: skip
        per_call = options_of_sums(sums, blocks, opened) | behind(tokens, base)
        token_backward(
            (blocks, rows, 1),
            (q, k, v, eta, base, *around, *kept, grad_o, pulls, of_error,
             *given(opened, k), of_q, of_k, of_v, of_eta, sums),
            (*numbers[:6], *of_q.stride()[:3], *numbers[6:], call.output_eps),
            options(call, base, READING, *features, PER_TOKEN=per_token, **outputs, **per_call),
        )  # fmt: skip
        if held:
            state, places = (*pending, base, start, before[0], norm), (time, blocks, group)
            of_held = pending_backward(call, state, of_pending, opened, sums, places)
    summed_rates, *of_norms = summed(sums, sizes, (batch, group, d))
    of_rates = of_eta if per_token else summed_rates.sum_to_size(rates.shape)
    of_change = of_start if start is not None else None
    return of_rates.to(rates.dtype), of_base.sum(0), of_change, *of_held, *of_norms, *new


def room_for_sums(
    base: Tensor, rows: int, blocks: int, norms: Given, per_token: bool, held: bool
) -> tuple[Tensor, list[int]]:
    """Room for what each block adds to the gradients of the norms and of eta, `[rows, .., S]`.

    Tokens that the state held get a row behind the blocks if the norm in the loss is there.

    Returns:
        The room, and how many of the S numbers are of which norm and of eta.
    """
    d = base.shape[-1]
    sizes = [*(0 if x is None else 2 * d for x in norms), 0 if per_token else 1]
    extra = held and norms[0] is not None
    make = base.new_zeros if extra else base.new_empty
    return make(rows, blocks + extra, sum(sizes)), sizes


def options_of_sums(sums: Tensor, blocks: int, opened: Given) -> dict[str, Any]:
    """What the last kernel is compiled for beside the others' options."""
    extra = {"SUMS": sums.shape[-1], "ROWS": sums.shape[1] - blocks}
    return {"OPEN": opened[0] is not None, **extra}


def summed(
    sums: Tensor, sizes: Sequence[int], shape: tuple[int, int, int]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of eta `[G]` and of both norms `[G, 2, d]` from those of all blocks."""
    batch, group, d = shape
    total = sums.view(batch, group, *sums.shape[1:]).sum((0, 2))
    inner, output, eta = total.split(sizes, dim=-1)
    inner, output = (x.unflatten(-1, (2, d)) if x.numel() else None for x in (inner, output))
    return eta.squeeze(-1), inner, output


def of_outputs(call: Call, grads: Given, q: Tensor, base: Tensor) -> Given:
    """Gradients of the outputs; None for all of the open mini-batch, or for none of it."""
    batch, time, group, d = q.shape
    wide = (batch, call.size, group, d)
    shapes = ((batch, time, group, call.width), (batch, group, d + 1, d), wide, wide, wide[:-1])
    of_open = any(x is not None for x in grads[2:])
    wanted = (True, grads[1] is not None, of_open, of_open, of_open)
    zeros = (q.new_zeros, *(base.new_zeros,) * 4)
    return tuple(
        None if not want else zero(shape) if x is None else x.contiguous()
        for x, shape, want, zero in zip(grads, shapes, wanted, zeros, strict=True)
    )


def pending_backward(
    call: Call,
    inputs: Given,
    gradient: Tensor,
    opened: Sequence[Tensor | None],
    sums: Tensor,
    extent: tuple[int, int, int],
) -> Given:
    """Gradients of the state's tokens; those by the norm go into the last row of `sums`."""
    *pending, base, start, count, norm = inputs
    assert base is not None and pending[0] is not None
    batch, _, group, _ = pending[0].shape
    held = [torch.empty_like(x) for x in pending if x is not None]
    common = options(call, base, READING, norm is not None, start is not None)
    of_sums = {"OPEN": opened[0] is not None, "SUMS": sums.shape[-1]}
    pending_back(
        (batch * group, 1, 1),
        given((*pending, base, start, count, norm, call.plan.rows, gradient, *opened, *held, sums),
              base),
        (*extent, call.eps),
        Options({key: common[key] for key in PENDING_OPTIONS} | of_sums),
    )  # fmt: skip
    return tuple(held)


SCANNING = 4
"""Warps of a scan, whose programs are too few to fill the chip: it waits for each product."""

READING = 1
"""Warps of the programs of single blocks, which are many."""

PENDING_OPTIONS = (
    *("SIZE", "D", "M", "BK", "BD", "ACC", "LN", "PLANNED"),
    *("num_warps", "num_stages"),
)


def split(tokens: Sequence[Tensor], base: Tensor) -> Sequence[Tensor]:
    """q, k and v, `[B, T, G, d]`."""
    if len(tokens) == 3:
        return tokens
    (group, _, d), x = base.shape, tokens[0]
    rows, times, columns = x.stride()
    shape, strides, first = (*x.shape[:2], group, d), (rows, times, d * columns, columns), group * d
    begin = x.storage_offset()
    k, q, v = (x.as_strided(shape, strides, begin + n * first * columns) for n in range(3))
    return q, k, v


def behind(tokens: Sequence[Tensor], base: Tensor) -> dict[str, int]:
    """Columns behind k, q and v, whose gradients are zeros, and their number as a power of two."""
    used = 3 * base.shape[0] * base.shape[-1]
    columns = tokens[0].shape[-1] - used if len(tokens) == 1 else 0
    return {"BEHIND": columns, "BEHIND_TILE": 1 << max(columns - 1, 0).bit_length()}


def strides(q: Tensor, eta: Tensor) -> tuple[int, ...]:
    """Of rows, tokens and adapters."""
    return (*q.stride()[:3], *eta.stride())


def options(call: Call, base: Tensor, few: int, norm: bool, state: bool, /, **more: Any) -> Options:
    """What a kernel is compiled for: sizes, features, and warps, see `warps`.

    Args:
        call: of the kernels.
        base: fast weights.
        few: warps of a program of small tiles.
        norm: there is one in the loss.
        state: there is one.
        **more: of this kernel.
    """
    plan, exact = call.plan, base.dtype == torch.float64
    sizes = (call.size, base.shape[-1], plan.tile, exact, few)
    planned = (plan.mask is not None, plan.entries is not None)
    return _options(*sizes, call.mode_b, norm, call.unit, *planned, state, **more)


@cache
def _options(size: int, d: int, tile: int, exact: bool, few: int, *flags: bool, **more: Any) -> Any:
    acc = tl.float64 if exact else tl.float32
    sizes = {"SIZE": size, "D": d, "M": tile, "BK": padded(d + 1), "BD": padded(d), "ACC": acc}
    features = zip(("MODE_B", "LN", "UNIT", "MASKED", "PLANNED", "STATE"), flags, strict=True)
    return Options({**sizes, **dict(features), **more, **warps(tile, d, few)})


def output_options(call: Call, output_norm: Tensor | None) -> dict[str, Any]:
    """What is done with what is read."""
    features = {"OUTPUT_NORM": output_norm is not None, "RESIDUAL": call.residual}
    return {"WIDTH": call.width, **features}


def warps(tile: int, d: int, few: int) -> dict[str, int]:
    """Warps of a program: `few` for tiles of 16 x 16, more for larger ones.

    The compiler does not pipeline loops: the scans fetch a block ahead by themselves.
    """
    keys, values = padded(d + 1), padded(d)
    largest = max(tile * keys, keys * values)
    return {"num_warps": few if largest <= 256 else 4 if largest <= 1024 else 8, "num_stages": 1}


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)
