"""TTT-Linear's kernels as operations in the graphs of `torch.compile`, one node each.

A schema has no lists with gaps: the tensors that a call has come without those that it has not, and
`given` says which (1 or 0 for each of `Inputs`, then for each tensor of the layout).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_modules.ops.nodes import there, unshared, with_gaps
from lightning_modules.ops.ttt_linear.launch import (
    Call,
    Inputs,
    Saved,
    room_forward,
    run_backward,
    run_forward,
)
from lightning_modules.ops.ttt_linear.layout import Layout

COUNT = len(Inputs._fields)
SIZES = 4
"""Fields of a layout that are integers; the others are tensors, or None."""


def in_graph(call: Call, *inputs: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """What `TTTLinear` returns, as one node of a graph; arguments as there."""
    layout: tuple[Any, ...] = call.layout
    places = [*inputs, *layout[SIZES:]]
    given = [int(x is not None) for x in places]
    options = [*layout[:SIZES], int(call.causal), int(call.flush), int(call.masked)]
    o, dw, db, *_ = _forward(there(places), given, options, call.eps)
    return o, dw, db


@torch.library.custom_op("fast_weights::ttt_linear", mutates_args=())
def _forward(
    tensors: Sequence[Tensor], given: Sequence[int], options: Sequence[int], eps: float
) -> list[Tensor]:
    *outputs, saved = run_forward(*_unpack(tensors, given, options, eps))
    return [*outputs, *saved]


@_forward.register_fake
def _(
    tensors: Sequence[Tensor], given: Sequence[int], options: Sequence[int], eps: float
) -> list[Tensor]:
    *outputs, saved = room_forward(*_unpack(tensors, given, options, eps))
    return [*outputs, *saved]


@torch.library.custom_op("fast_weights::ttt_linear_backward", mutates_args=())
def _backward(
    tensors: Sequence[Tensor],
    given: Sequence[int],
    options: Sequence[int],
    eps: float,
    saved: Sequence[Tensor],
    do: Tensor | None,
    dw: Tensor | None,
    db: Tensor | None,
) -> list[Tensor]:
    call, x = _unpack(tensors, given, options, eps)
    return unshared(there(run_backward(call, x, Saved(*saved), do, dw, db)))


@_backward.register_fake
def _(
    tensors: Sequence[Tensor],
    given: Sequence[int],
    options: Sequence[int],
    eps: float,
    saved: Sequence[Tensor],
    do: Tensor | None,
    dw: Tensor | None,
    db: Tensor | None,
) -> list[Tensor]:
    _, x = _unpack(tensors, given, options, eps)
    return [y.new_empty(y.shape) for y in there(x)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, *ctx.options = inputs
    ctx.mark_non_differentiable(*output[3:])
    ctx.save_for_backward(*tensors, *output[3:])


def _differentiate(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    count = len(ctx.saved_tensors) - len(Saved._fields)
    tensors, saved = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
    found = _backward(tensors, *ctx.options, saved, *grads[:3])
    return [*found, *[None] * (count - len(found))], None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def _unpack(
    tensors: Sequence[Tensor], given: Sequence[int], options: Sequence[int], eps: float
) -> tuple[Call, Inputs]:
    """What `in_graph` was given, from what a schema can hold of it."""
    places: list[Any] = with_gaps(tensors, given)
    size, number, group, pending, causal, flush, masked = options
    layout = Layout(size, number, group, pending, *places[COUNT:])
    return Call(layout, bool(causal), bool(flush), bool(masked), eps), Inputs(*places[:COUNT])
