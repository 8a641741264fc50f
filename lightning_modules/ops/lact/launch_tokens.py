"""LaCT's Triton kernels on tokens, called with tensors."""

from typing import Any

import torch
from torch import Tensor

from lightning_modules.ops.lact.walk import Block
from lightning_modules.ops.tile_size import padded

TOKENS = 16
"""Rows of tokens of a program."""


def gather(x: Tensor, held: Tensor | None, block: Block, dtype: torch.dtype) -> Tensor:
    """The block's slots of x `[B, T, H, E]` and of the state's tokens, `[S, G, w, E]`."""
    from lightning_modules.ops.lact.kernels.tokens import gather_kernel

    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, _, heads, inner = x.shape
    out = x.new_empty(block.number, heads * batch, block.width, inner, dtype=dtype)
    if out.numel():
        strides = dict(zip(("row_stride", "time_stride", "head_stride"), x.stride(), strict=False))
        options = _token_options(x, held, block)
        # Vectors of 16 bytes; of E alone, so that no other length compiles another kernel.
        options["ALIGNED"] = inner % 16 == 0 and x.stride(0) % 16 == 0
        gather_kernel[_token_grid(x, block)](x=x, out=out, **strides, **options)
    return out


def scatter(slots: Tensor, x: Tensor, held: Tensor | None, block: Block) -> None:
    """The inverse: writes into x and held, both contiguous, where the block has tokens."""
    from lightning_modules.ops.lact.kernels.tokens import scatter_kernel

    if slots.numel():
        options = _token_options(x, held, block)
        scatter_kernel[_token_grid(x, block)](x=x, slots=slots, **options)


def _token_grid(x: Tensor, block: Block) -> tuple[int, int]:
    return block.number * len(x) * -(-block.width // TOKENS), x.shape[2]


def _token_options(x: Tensor, held: Tensor | None, block: Block) -> dict[str, Any]:
    batch, time, heads, inner = x.shape
    return {
        "held": held,
        "token": block.token,
        "start": block.start,
        "S": block.number,
        "w": block.width,
        "B": batch,
        "H": heads,
        "T": time,
        "P": block.pending,
        "Q": 0 if held is None else held.shape[1],
        "E": inner,
        "BE": padded(inner),
        "BT": TOKENS,
        "HAS_MAP": block.token is not None,
        "HAS_HELD": held is not None,
        "num_warps": 4,
    }


def read_gate(ph: Tensor, hidden_size: int) -> Tensor:
    """`silu(p) h`, `[..., F]`, from rows `[..., 2 F]` or `[..., 4 F]` that begin with p and h."""
    from lightning_modules.ops.lact.kernels.gates import read_gate_kernel

    hidden = ph.new_empty(*ph.shape[:-1], hidden_size)
    options = _gate_options(ph, hidden_size)
    read_gate_kernel[_gate_grid(options)](
        ph=ph, hidden=hidden, PARTS=ph.shape[-1] // hidden_size, **options
    )
    return hidden


def read_gate_backward(ph: Tensor, dhidden: Tensor, out: Tensor) -> Tensor:
    """Gradients of p, h into out `[..., 2 F]`, which may be ph; dhidden becomes `silu(p) h`."""
    from lightning_modules.ops.lact.kernels.gates import read_gate_backward_kernel

    size = dhidden.shape[-1]
    options = _gate_options(ph, size)
    read_gate_backward_kernel[_gate_grid(options)](
        ph=ph, dhidden=dhidden, dph=out, hidden=dhidden, PARTS=ph.shape[-1] // size, **options
    )
    return dhidden


def write_gate(
    ph: Tensor, u: Tensor, rates: Tensor, hidden_size: int, *, scaled: bool, plain: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`lr0 a | lr2 u g` and `lr1 g h` if scaled, `a | u g` if plain, else None.

    Args:
        ph: rows that begin with p and h, `[G, C, 2 F]` or `[G, C, 4 F]`.
        u: rows that begin with u, `[G, C, F]` or `[G, C, 2 F]`.
        rates: `[G, C, 3 or 4]`.
        hidden_size: F.
        scaled: see above.
        plain: see above.
    """
    from lightning_modules.ops.lact.kernels.gates import write_gate_kernel

    lead = ph.shape[:-1]
    both = ph.new_empty(*lead, 2 * hidden_size) if scaled else None
    hidden = ph.new_empty(*lead, hidden_size) if scaled else None
    alone = ph.new_empty(*lead, 2 * hidden_size) if plain else None
    options = _gate_options(ph, hidden_size)
    write_gate_kernel[_gate_grid(options)](
        ph=ph,
        u=u,
        rates=rates,
        scaled=both,
        plain=alone,
        hidden=hidden,
        R=rates.shape[-1],
        PARTS=ph.shape[-1] // hidden_size,
        U_PARTS=u.shape[-1] // hidden_size,
        SCALED=scaled,
        PLAIN=plain,
        **options,
    )
    return both, hidden, alone


def write_gate_backward(
    pa: Tensor,
    ud: Tensor,
    rates: Tensor,
    extra: Tensor | None,
    drates: Tensor,
    add: bool,
    out: Tensor,
) -> None:
    """`dp | dh | lr0 a | lr2 u g` into out, which may be pa, and `du | lr1 g h` into ud.

    Args:
        pa: p, h and the gradients of `lr0 a`, `lr2 u g`, `[G, C, 4 F]`.
        ud: u and the gradient of `lr1 g h`, `[G, C, 2 F]`.
        rates: `[G, C, 3 or 4]`.
        extra: gradients of `a`, `u g`, `[G, C, 2 F]`.
        drates: gets those of the rates.
        add: add them to what is there.
        out: `[G, C, 4 F]`.
    """
    from lightning_modules.ops.lact.kernels.gates import write_gate_backward_kernel

    options = _gate_options(pa, ud.shape[-1] // 2) | {"BT": 8}
    write_gate_backward_kernel[_gate_grid(options)[:1]](
        pa=pa,
        ud=ud,
        rates=rates,
        extra=extra,
        pa_out=out,
        ud_out=ud,
        drates=drates,
        R=rates.shape[-1],
        EXTRA=extra is not None,
        ADD=add,
        **options,
    )


def _gate_options(rows: Tensor, hidden_size: int) -> dict[str, Any]:
    import triton.language as tl

    return {
        "M": rows.shape[:-1].numel(),
        "F": hidden_size,
        "WIDE": tl.float64 if rows.dtype == torch.float64 else tl.float32,
        "BT": 16,
        "BF": min(128, padded(hidden_size)),
        "num_warps": 4,
    }


def _gate_grid(options: dict[str, Any]) -> tuple[int, int]:
    return -(-options["M"] // options["BT"]), -(-options["F"] // options["BF"])
