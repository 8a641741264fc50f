"""LaCT's Triton kernels, called with tensors; the shapes are those of `kernels/`."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_modules.ops.lact.memory import EPS
from lightning_modules.ops.lact.walk import Block, Change

Pair = tuple[Tensor, Tensor]
"""`[G, 2 F, D]` and `[G, D, F]`."""

TOKENS = 16
"""Rows of tokens of a program."""


class Sizes(NamedTuple):
    """Rows, heads, hidden channels and channels of a call, and what its products read."""

    batch: int
    heads: int
    hidden: int
    size: int
    low: torch.dtype

    @property
    def groups(self) -> int:
        """G, matrices of a kind."""
        return self.batch * self.heads

    @property
    def packed(self) -> int:
        """Numbers of a head's weights."""
        return 3 * self.hidden * self.size

    @property
    def rows(self) -> int:
        """Rows of a head's weights."""
        return 2 * self.hidden + self.size

    def pair(self, packed: Tensor) -> Pair:
        """Packed weights `[G, 3 F D]` as a pair (views)."""
        first, second = packed.split([2 * self.hidden * self.size, self.hidden * self.size], dim=1)
        return first.unflatten(1, (-1, self.size)), second.unflatten(1, (self.size, -1))

    def operands(self, both: Tensor) -> Pair:
        """Weights beside gradients, `[G, 6 F D]`, as `[G, 4 F, D]` and `[G, D, 2 F]` (views)."""
        cut = 4 * self.hidden * self.size
        first, second = both[:, :cut], both[:, cut:]
        return first.unflatten(1, (-1, self.size)), second.unflatten(1, (self.size, -1))


def gather(x: Tensor, held: Tensor | None, block: Block, dtype: torch.dtype) -> Tensor:
    """The block's slots of x `[B, T, H, E]` and of the state's tokens, `[S, G, w, E]`."""
    from lightning_modules.ops.lact.kernels.tokens import gather_kernel

    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, _, heads, inner = x.shape
    out = x.new_empty(block.count, heads * batch, block.width, inner, dtype=dtype)
    if out.numel():
        strides = dict(zip(("row_stride", "time_stride", "head_stride"), x.stride(), strict=False))
        options = _token_options(x, held, block)
        gather_kernel[_token_grid(x, block)](x=x, out=out, **strides, **options)
    return out


def scatter(slots: Tensor, x: Tensor, held: Tensor | None, block: Block) -> None:
    """The inverse: writes into x and held, both contiguous, where the block has tokens."""
    from lightning_modules.ops.lact.kernels.tokens import scatter_kernel

    if slots.numel():
        options = _token_options(x, held, block)
        scatter_kernel[_token_grid(x, block)](x=x, slots=slots, **options)


def _token_grid(x: Tensor, block: Block) -> tuple[int, int]:
    return block.count * len(x) * -(-block.width // TOKENS), x.shape[2]


def _token_options(x: Tensor, held: Tensor | None, block: Block) -> dict[str, Any]:
    batch, time, heads, inner = x.shape
    return {
        "held": held,
        "token": block.token,
        "start": block.start,
        "S": block.count,
        "w": block.width,
        "B": batch,
        "H": heads,
        "T": time,
        "P": block.pending,
        "Q": 0 if held is None else held.shape[1],
        "E": inner,
        "BE": _power(inner),
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
        "BF": min(128, _power(hidden_size)),
        "num_warps": 4,
    }


def _gate_grid(options: dict[str, Any]) -> tuple[int, int]:
    return -(-options["M"] // options["BT"]), -(-options["F"] // options["BF"])


def add_momentum(
    sizes: Sizes,
    change: Change,
    pair: Pair | None,
    old: Tensor | None,
    mean: Tensor | None,
    out: Tensor,
) -> None:
    """`out = g + mean old`, packed `[G, 3 F D]`; mean `[G]`. Without old, `out = g`."""
    from lightning_modules.ops.lact.kernels.update import momentum_kernel

    first, second = pair or (None, None)
    options = _change_options(sizes, change, out)
    momentum_kernel[_row_grid(options, sizes)](
        first=first,
        second=second,
        old=old,
        mean=mean,
        out=out,
        MOMENTUM=old is not None,
        **options,
    )


class Norms(NamedTuple):
    """Row norms `[G, 2 F + D]`: at the beginning, and of the learned weights (with documents)."""

    start: Tensor
    learned: Tensor | None


def update(
    sizes: Sizes,
    change: Change,
    by: Pair | Tensor | None,
    main_old: Tensor,
    main: Tensor,
    now: Tensor,
    low: Tensor,
    norms: Norms,
    learned: Tensor | None,
    prenorm: bool,
) -> None:
    """The next version, packed: main, W (now, in place), W for products (low).

    Args:
        sizes: of the call.
        change: which rows.
        by: what is added.
        main_old: main of the version before.
        main: gets the new one.
        now: W.
        low: gets the new W, rounded.
        norms: of the rows.
        learned: weights with which documents begin.
        prenorm: add to main, not to W.
    """
    from lightning_modules.ops.lact.kernels.update import update_kernel

    first, second = by if isinstance(by, tuple) else (None, None)
    options = _change_options(sizes, change, now)
    update_kernel[_row_grid(options, sizes)](
        first=first,
        second=second,
        packed=by if torch.is_tensor(by) else None,
        main_old=main_old,
        main=main,
        now=now,
        low=low,
        start_norm=norms.start,
        learned_norm=norms.learned,
        learned=learned,
        renewed=change.renewed,
        EPS=EPS,
        PRENORM=prenorm,
        PACKED=torch.is_tensor(by),
        HAS_RENEWED=change.renewed is not None,
        **options,
    )


class Carry(NamedTuple):
    """Gradients of one block that the way back through the versions adds up, in place.

    Attributes:
        weights: at W, packed `[G, 3 F D]`.
        main: at main, with pre-norm.
        momentum: at M, with momentum.
        norms: of the row norms.
        learned: of the weights with which documents begin.
    """

    weights: Tensor
    main: Tensor | None
    momentum: Tensor | None
    norms: Norms
    learned: Tensor | None


def update_backward(
    sizes: Sizes,
    change: Change,
    carry: Carry,
    read: Pair | None,
    write: Pair | None,
    main: Tensor,
    old: Tensor,
    both: Tensor,
    dchange: Tensor | None,
    norms: Norms,
) -> None:
    """Carry the gradients of a version to the one before; see `update_backward_kernel`."""
    from lightning_modules.ops.lact.kernels.update import update_backward_kernel

    read_first, read_second = read or (None, None)
    write_first, write_second = write or (None, None)
    options = _change_options(sizes, change, main)
    update_backward_kernel[_row_grid(options, sizes)](
        main=main,
        carry=carry.weights,
        carry_main=carry.main,
        read_first=read_first,
        read_second=read_second,
        write_first=write_first,
        write_second=write_second,
        old=old,
        both=both,
        dchange=dchange,
        start_norm=norms.start,
        learned_norm=norms.learned,
        dstart_norm=carry.norms.start,
        dlearned_norm=carry.norms.learned,
        dlearned=carry.learned,
        renewed=change.renewed,
        EPS=EPS,
        PRENORM=carry.main is not None,
        PACKED=dchange is not None,
        HAS_READ=read is not None,
        HAS_WRITE=write is not None,
        HAS_RENEWED=change.renewed is not None,
        **options,
    )


def momentum_backward(
    sizes: Sizes,
    change: Change,
    dchange: Tensor,
    carry: Tensor | None,
    momentum: Tensor,
    mean: Tensor | None,
    old: Tensor,
    both: Tensor,
    dmean: Tensor | None,
) -> None:
    """From dchange to both, by way of momentum; see `momentum_backward_kernel`."""
    from lightning_modules.ops.lact.kernels.update import momentum_backward_kernel

    options = _change_options(sizes, change, dchange)
    momentum_backward_kernel[_row_grid(options, sizes)](
        dchange=dchange,
        carry=carry,
        momentum=momentum,
        mean=mean,
        old=old,
        both=both,
        dmean=dmean,
        MOMENTUM=carry is not None,
        **options,
    )


def _row_grid(options: dict[str, Any], sizes: Sizes) -> tuple[int]:
    return (sizes.groups * -(-sizes.rows // options["BR"]),)


def _change_options(sizes: Sizes, change: Change, like: Tensor) -> dict[str, Any]:
    return {
        "restart": change.restart,
        "rows": change.rows,
        "B": sizes.batch,
        "F": sizes.hidden,
        "D": sizes.size,
        "BLOCK": _power(max(sizes.hidden, sizes.size)),
        "WRITES": change.write is not None,
        "HAS_ROWS": change.rows is not None,
        "HAS_RESTART": change.restart is not None,
        "BR": _tile(like, 4, 16),
        "num_warps": 4,
    }


def _tile(x: Tensor, compiled: int, interpreted: int) -> int:
    """Rows of a program; a program that is interpreted costs the same for many."""
    return compiled if x.is_cuda else interpreted


def _power(size: int) -> int:
    """The power of two that holds a size, at least 16."""
    return max(16, 1 << (size - 1).bit_length())
