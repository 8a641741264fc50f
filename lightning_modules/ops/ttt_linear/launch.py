"""TTT-Linear's kernels as one differentiable function."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_modules.ops.launcher import Grid, Options, given, launcher
from lightning_modules.ops.tile_size import padded
from lightning_modules.ops.ttt_eager import refuse_second_derivatives
from lightning_modules.ops.ttt_linear.layout import GROUP, Layout

KERNELS = "lightning_modules.ops.ttt_linear.kernels"


class Call(NamedTuple):
    """What the kernels are told beside tensors.

    Attributes:
        layout: how rows are cut into mini-batches.
        causal: as in the op.
        flush: as in the op.
        masked: whether tokens of the call may have no slot.
        eps: of the LayerNorms.
    """

    layout: Layout
    causal: bool
    flush: bool
    masked: bool
    eps: float


class TTTLinear(torch.autograd.Function):
    """`o, dw, db` of a call; differentiable once.

    Inputs are contiguous: `q, k, v [B, T, H, D]` in one dtype, the others in that of the state:
    `eta [B, T, H]`, `tau [m]` (None: not causal), `gamma, beta [H, D]`, `w [H or B H, D, D]` and
    `b`, the state's `dw, db` (None: zero) and pending `k, v, eta` (None: it has none).
    """

    @staticmethod
    def forward(ctx: Any, call: Call, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        o, dw, db, saved = run_forward(call, Inputs(*inputs))
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, *saved)
        return o, dw, db

    @staticmethod
    def backward(
        ctx: Any, do: Tensor | None, dw: Tensor | None, db: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives("ttt_linear", "triton")
        tensors, count = ctx.saved_tensors, len(Inputs._fields)
        inputs, saved = Inputs(*tensors[:count]), Saved(*tensors[count:])
        return None, *run_backward(ctx.call, inputs, saved, do, dw, db)


class Inputs(NamedTuple):
    """The tensors that `TTTLinear` takes, in this order; gradients come in the same order."""

    q: Tensor
    k: Tensor
    v: Tensor
    eta: Tensor
    tau: Tensor | None
    gamma: Tensor
    beta: Tensor
    w: Tensor
    b0: Tensor
    dw: Tensor | None
    db: Tensor | None
    held_k: Tensor | None
    held_v: Tensor | None
    held_eta: Tensor | None


class Saved(NamedTuple):
    """What the forward kernels leave for the backward ones.

    Attributes:
        g: gradients at the predictions for the keys, `[B, H, N m, D]`.
        weights: weight at the start of each group, its outputs along `_axis`,
            `[B, H, N / S, D, D]`.
        biases: its bias, `[B, H, N / S, D]`.
    """

    g: Tensor
    weights: Tensor
    biases: Tensor


def run_forward(call: Call, x: Inputs) -> tuple[Tensor, Tensor, Tensor, Saved]:
    """Outputs, the state's changes, and what the backward pass needs."""
    layout, size = call.layout, x.q.shape[-1]
    o, dw, db, saved = room_forward(call, x)
    batch, heads, groups = saved.weights.shape[:3]
    with torch.cuda.device_of(x.q):
        _launch(
            "forward.write_kernel",
            (batch * heads, 1, 1),
            call,
            x,
            {
                **_tokens(x, "k", "v", "eta", "held_k", "held_v", "held_eta"),
                **_tokens(x, "tau", "gamma", "beta", "w", "b0", "dw", "db"),
                **saved._asdict(),
                **{"restart": layout.restart, "kept": layout.kept, "dw_out": dw, "db_out": db},
            },
            EPS=call.eps,
            PER_ROW=x.w.dim() == 4,
            HAS_STATE=x.dw is not None,
            HAS_DOCUMENTS=layout.restart is not None,
            **_walk(layout, size),
        )
        _launch(
            "forward.read_kernel",
            (groups, batch * heads, 1),
            call,
            x,
            {
                **_tokens(x, "q", "k", "eta", "held_k", "held_eta", "tau", "gamma", "beta"),
                **saved._asdict(),
                "o": o,
            },
            EPS=call.eps,
            **_tile(layout, size),
        )
    return o, dw, db, saved


def room_forward(call: Call, x: Inputs) -> tuple[Tensor, Tensor, Tensor, Saved]:
    """Tensors for what `run_forward` returns; outputs are zero where a token may have no slot."""
    layout, (batch, _, heads, size) = call.layout, x.q.shape
    groups, slots = -(-layout.number // layout.group), layout.number * layout.size
    saved = Saved(
        x.q.new_empty(batch, heads, slots, size),
        x.q.new_empty(batch, heads, groups, size, size),
        x.eta.new_empty(batch, heads, groups, size),
    )
    o = torch.zeros_like(x.q) if call.masked else torch.empty_like(x.q)
    dw = x.eta.new_empty(batch, heads, size, size)
    db = x.eta.new_empty(batch, heads, 1, size)
    return o, dw, db, saved


def run_backward(
    call: Call,
    x: Inputs,
    saved: Saved,
    do: Tensor | None,
    dw_out: Tensor | None,
    db_out: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of the inputs, in their order, from those of the outputs (None: zero)."""
    layout, (batch, heads, groups, size, _) = call.layout, saved.weights.shape
    upper, halves = _upper(x, dw_out, db_out), 1 if size <= NARROW else 2
    slot = {name: torch.empty_like(saved.g) for name in ("dp", "dg", "zh", "dh", "dz")}
    scalar = {name: x.eta.new_empty(saved.g.shape[:3]) for name in ("rstd", "along")}
    state, sums = _state_gradients(call, saved, x), x.eta.new_empty(batch, heads, groups, 2, size)
    token = _token_gradients(call, x)
    dtau = x.eta.new_empty(batch, heads, layout.number, layout.size)
    ends = {"beta": x.beta, "do": torch.zeros_like(x.q) if do is None else do.contiguous()}
    ends |= {"sums": sums, "g": saved.g, "weights": saved.weights}
    own = _tokens(x, "q", "k", "v", "eta", "held_k", "held_v", "held_eta", "tau", "gamma")
    fewer = {name: own[name] for name in own if name not in ("v", "held_v")}
    some = {name: slot[name] for name in ("dp", "dg", "zh")}
    others = {name: slot[name] for name in ("dp", "dh", "dz", "zh")}
    of_groups = {name: state[name] for name in ("dweights", "dbiases")}
    with torch.cuda.device_of(x.q):
        _launch(
            "backward.output_gradient_kernel",
            (groups, batch * heads, halves),
            call,
            x,
            {**own, **scalar, **some, **ends, "biases": saved.biases},
            EPS=call.eps,
            HALVES=halves,
            **_tile(layout, size),
        )
        end = {"g": saved.g, "restart": layout.restart, "dw_out": upper[0], "db_out": upper[1]}
        _launch(
            "backward.weight_gradient_kernel",
            (batch * heads, 1, 1),
            call,
            x,
            {**fewer, **scalar, **slot, **state, **end},
            HAS_DSTATE=upper[0] is not None,
            HAS_DOCUMENTS=layout.restart is not None,
            **_walk(layout, size),
        )
        _launch(
            "inputs.input_gradient_kernel",
            (groups, batch * heads, 1),
            call,
            x,
            {**own, **others, **of_groups, **token, **ends, "dtau": dtau},
            **_tile(layout, size),
        )
    return _gradients(call, x, state, token, upper, dw_out, db_out, sums, dtau)


def _upper(
    x: Inputs, dw: Tensor | None, db: Tensor | None
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Gradients at the outgoing state, less their mean over the outputs; None: zero."""
    if dw is None and db is None:
        return None, None
    batch, _, heads, size = x.q.shape
    dw = x.eta.new_zeros(batch, heads, size, size) if dw is None else dw
    db = x.eta.new_zeros(batch, heads, 1, size) if db is None else db
    return (
        (dw - dw.mean(-1, keepdim=True)).contiguous(),
        (db - db.mean(-1, keepdim=True)).contiguous(),
    )


def _state_gradients(call: Call, saved: Saved, x: Inputs) -> dict[str, Tensor | None]:
    """Room for the gradients of each group's weights, the state, and documents' initial weights."""
    batch, _, heads, size = x.q.shape
    shapes = {"dw": (batch, heads, size, size), "db": (batch, heads, 1, size)}
    documents = call.layout.restart is not None
    rows = {f"{n}_rows": x.eta.new_zeros(s) if documents else None for n, s in shapes.items()}
    return {
        "dweights": torch.empty_like(saved.weights),
        "dbiases": torch.empty_like(saved.biases),
        **{name: x.eta.new_empty(shape) for name, shape in shapes.items()},
        **rows,
    }


def _token_gradients(call: Call, x: Inputs) -> dict[str, Tensor | None]:
    """Room for the gradients of tokens: zero where a token may have no slot."""
    new = torch.zeros_like if call.masked else torch.empty_like
    out: dict[str, Tensor | None] = {
        f"d{name}": new(getattr(x, name)) for name in ("q", "k", "v", "eta")
    }
    for name in ("held_k", "held_v", "held_eta"):
        held = getattr(x, name)
        out[f"d{name}"] = None if held is None else torch.zeros_like(held)
    return out


def _gradients(
    call: Call,
    x: Inputs,
    state: dict[str, Tensor | None],
    token: dict[str, Tensor | None],
    upper: tuple[Tensor, Tensor] | tuple[None, None],
    dw_out: Tensor | None,
    db_out: Tensor | None,
    sums: Tensor,
    dtau: Tensor,
) -> tuple[Tensor | None, ...]:
    """Sum what programs left in parts, in an order that does not depend on the run."""
    norm = sums.sum((0, 2))
    learned, carried = [], []
    for name, outgoing, centred, initial in (
        ("dw", dw_out, upper[0], x.w),
        ("db", db_out, upper[1], x.b0),
    ):
        below = state[name]
        rows = below if state[f"{name}_rows"] is None else state[f"{name}_rows"]
        assert below is not None and rows is not None
        # The outgoing change is W less the initial weight.
        rows = rows if centred is None else rows - centred
        learned.append(rows if initial.dim() == 4 else rows.sum(0))
        if outgoing is not None:
            mean = outgoing.mean(-1, keepdim=True)
            kept = call.layout.kept
            below = below + (mean if kept is None else mean * kept.view(-1, 1, 1, 1))
        carried.append(None if x.dw is None else below)
    return (
        *(token[f"d{name}"] for name in ("q", "k", "v", "eta")),
        dtau.sum((0, 1, 2)) if call.causal else None,
        norm[:, 0],
        norm[:, 1],
        *learned,
        *carried,
        *(token[f"dheld_{name}"] for name in ("k", "v", "eta")),
    )


def _tokens(x: Inputs, *names: str) -> dict[str, Tensor | None]:
    return {name: getattr(x, name) for name in names}


def _launch(
    name: str, grid: Grid, call: Call, x: Inputs, tensors: dict[str, Tensor | None], **own: Any
) -> None:
    """Launch a kernel, `module.name`.

    Args:
        name: of the kernel.
        grid: how many programs.
        call: as in `run_forward`.
        x: likewise.
        tensors: that the kernel takes beside those of the layout, by its names for them.
        **own: constants and options that not every kernel takes.
    """
    layout, (batch, time, heads, size) = call.layout, x.q.shape
    module, _, kernel = name.partition(".")
    found = launcher(f"{KERNELS}.{module}", kernel)
    tensors |= {"token": layout.token, "fill": layout.fill, "last": layout.last}
    in_order = [tensors[n] for n in found.kernel.arg_names[: len(tensors)]]
    options = Options(
        own,
        D=size,
        BD=padded(size),
        AXIS=_axis(layout, size),
        PRECISION="tf32x3" if x.q.dtype == torch.float32 else "ieee",
        CAUSAL=call.causal,
        FLUSH=call.flush,
        HAS_GRID=layout.token is not None,
        HAS_PENDING=layout.pending > 0,
    )
    numbers = (time, layout.number, layout.size, layout.group, layout.pending, batch, heads)
    found(grid, given(in_order, x.q), numbers, options)


NARROW = 64
"""Most channels of a head whose weights leave a program of four warps registers for the rest."""

PART = 32
"""Most tokens at once beside the weights of wider heads."""

ROWS = 64
"""Fewest rows of a product that a group of four warps takes at once (wgmma)."""


def _axis(layout: Layout, size: int) -> int:
    """The axis along which walks hold outputs, in tiles of tokens and in weights.

    1 if tokens can be the rows of a product: a warp then has all channels of its tokens, and sums
    over them stay within it. Fewer tokens are columns, and D the rows.
    """
    return int(size <= NARROW and padded(layout.size) >= ROWS)


def _walk(layout: Layout, size: int) -> dict[str, int]:
    """Options of the kernels that walk from mini-batch to mini-batch.

    With tokens as rows Triton's pipeline loads two steps ahead: on an H200 that was faster than one
    (see `benchmarks/NOTES.md`), and fits into shared memory even in float32.
    """
    whole, wide, axis = padded(layout.size), size > NARROW, _axis(layout, size)
    tokens = min(whole, PART) if wide else whole
    parts = whole // tokens
    return {
        "BT": tokens,
        "PARTS": parts,
        "AHEAD": parts == 1 and axis == 0,
        "num_warps": 8 if wide else 4,
        "num_stages": 3 if axis == 1 else 2,
    }


def _tile(layout: Layout, size: int) -> dict[str, int]:
    """Options of the kernels that take a group at once."""
    slots, warps = min(GROUP, layout.group * layout.size), 4 if size <= NARROW else 8
    alone = layout.group == 1
    return {"BG": padded(slots), "SINGLE": alone, "num_warps": warps, "num_stages": 1}
