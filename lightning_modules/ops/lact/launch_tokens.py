"""LaCT's Triton kernels on tokens, called with tensors."""

from functools import cache

import torch
from torch import Tensor

from lightning_modules.ops.lact.walk import Block
from lightning_modules.ops.launcher import Options, given, launcher, wide
from lightning_modules.ops.tile_size import padded

KERNELS = "lightning_modules.ops.lact.kernels.tokens"
GATES = "lightning_modules.ops.lact.kernels.gates"

TOKENS = 16
"""Rows of tokens of a program."""


def gather(x: Tensor, held: Tensor | None, block: Block, dtype: torch.dtype) -> Tensor:
    """The block's slots of x `[B, T, H, E]` and of the state's tokens, `[S, G, w, E]`."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, _, heads, inner = x.shape
    out = x.new_empty(block.number, heads * batch, block.width, inner, dtype=dtype)
    if out.numel():
        strides = x.stride()[:3]
        # Vectors of 16 bytes; of E alone, so that no other length compiles another kernel.
        aligned = inner % 16 == 0 and strides[0] % 16 == 0
        options = _token_options(inner, *_features(held, block), ALIGNED=aligned)
        tensors = given((x, held, block.token, out), x)
        sizes = (*strides, *_token_sizes(x, held, block))
        launcher(KERNELS, "gather_kernel")(_token_grid(x, block), tensors, sizes, options)
    return out


def scatter(slots: Tensor, x: Tensor, held: Tensor | None, block: Block) -> None:
    """The inverse: writes into x and held, both contiguous, where the block has tokens."""
    if slots.numel():
        options = _token_options(x.shape[-1], *_features(held, block))
        tensors = given((x, held, block.token, slots), x)
        sizes = _token_sizes(x, held, block)
        launcher(KERNELS, "scatter_kernel")(_token_grid(x, block), tensors, sizes, options)


def _token_grid(x: Tensor, block: Block) -> tuple[int, int, int]:
    return block.number * len(x) * -(-block.width // TOKENS), x.shape[2], 1


def _token_sizes(x: Tensor, held: Tensor | None, block: Block) -> tuple[int, ...]:
    batch, time, heads, _ = x.shape
    before = 0 if held is None else held.shape[1]
    return block.start, block.number, block.width, batch, heads, time, block.pending, before


def _features(held: Tensor | None, block: Block) -> tuple[bool, bool]:
    return block.token is not None, held is not None


@cache
def _token_options(inner: int, mapped: bool, held: bool, **more: bool) -> Options:
    sizes = {"E": inner, "BE": padded(inner), "BT": TOKENS, "num_warps": 4}
    return Options(sizes, HAS_MAP=mapped, HAS_HELD=held, **more)


def read_gate(ph: Tensor, hidden_size: int) -> Tensor:
    """`silu(p) h`, `[..., F]`, from rows `[..., 2 F]` or `[..., 4 F]` that begin with p and h."""
    hidden = ph.new_empty(*ph.shape[:-1], hidden_size)
    options = _gate_options(ph.dtype, hidden_size, PARTS=ph.shape[-1] // hidden_size)
    _gate("read_gate", (ph, hidden), options)
    return hidden


def read_gate_backward(ph: Tensor, dhidden: Tensor, out: Tensor) -> Tensor:
    """Gradients of p, h into out `[..., 2 F]`, which may be ph; dhidden becomes `silu(p) h`."""
    size = dhidden.shape[-1]
    options = _gate_options(ph.dtype, size, PARTS=ph.shape[-1] // size)
    _gate("read_gate_backward", (ph, dhidden, out, dhidden), options)
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
    lead = ph.shape[:-1]
    both = ph.new_empty(*lead, 2 * hidden_size) if scaled else None
    hidden = ph.new_empty(*lead, hidden_size) if scaled else None
    alone = ph.new_empty(*lead, 2 * hidden_size) if plain else None
    options = _gate_options(
        ph.dtype,
        hidden_size,
        R=rates.shape[-1],
        PARTS=ph.shape[-1] // hidden_size,
        U_PARTS=u.shape[-1] // hidden_size,
        SCALED=scaled,
        PLAIN=plain,
    )
    _gate("write_gate", (ph, u, rates, both, alone, hidden), options)
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
    size, flags = ud.shape[-1] // 2, {"EXTRA": extra is not None, "ADD": add}
    options = _gate_options(pa.dtype, size, R=rates.shape[-1], BT=8, **flags)
    tensors = (pa, ud, rates, extra, out, ud, drates)
    _gate("write_gate_backward", tensors, options, walks=True)


def _gate(
    name: str, tensors: tuple[Tensor | None, ...], options: Options, walks: bool = False
) -> None:
    """Launch a kernel on the tokens of the first tensor; `walks`: a program has all channels."""
    first = tensors[0]
    assert first is not None
    count = first.shape[:-1].numel()
    across = 1 if walks else -(-options["F"] // options["BF"])
    grid = (-(-count // options["BT"]), across, 1)
    launcher(GATES, f"{name}_kernel")(grid, given(tensors, first), (count,), options)


@cache
def _gate_options(dtype: torch.dtype, hidden_size: int, *, BT: int = 16, **more: int) -> Options:
    """BT: rows of a program."""
    own = {"F": hidden_size, "WIDE": wide(dtype), "BT": BT, "BF": min(128, padded(hidden_size))}
    return Options(own, num_warps=4, **more)
