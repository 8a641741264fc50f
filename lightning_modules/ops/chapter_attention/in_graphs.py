"""Chapter attention's kernels as operations in the graphs of `torch.compile`, one node each."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_modules.ops.chapter_attention.launch import (
    Call,
    Inputs,
    backward,
    forward,
    room_forward,
)


def in_graph(call: Call, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """What `Read` returns, as one node of a graph; arguments as there."""
    sizes = [call.time, call.block, int(call.mixture), int(call.by_block)]
    o, lse, *_ = _forward(inputs, sizes, call.scale)
    return o, lse


@torch.library.custom_op("fast_weights::chapter_attention", mutates_args=())
def _forward(inputs: Sequence[Tensor], sizes: Sequence[int], scale: float) -> list[Tensor]:
    return list(forward(_call(sizes, scale), Inputs(*inputs)))


@_forward.register_fake
def _(inputs: Sequence[Tensor], sizes: Sequence[int], scale: float) -> list[Tensor]:
    return list(room_forward(_call(sizes, scale), Inputs(*inputs)))


@torch.library.custom_op("fast_weights::chapter_attention_backward", mutates_args=())
def _backward(
    inputs: Sequence[Tensor],
    sizes: Sequence[int],
    scale: float,
    o: Tensor | None,
    lse: Tensor,
    groups: Sequence[Tensor],
    do: Tensor | None,
    dlse: Tensor | None,
) -> list[Tensor]:
    x, call = Inputs(*inputs), _call(sizes, scale)
    return [y.contiguous() for y in backward(call, x, o, lse, groups, do, dlse)]


@_backward.register_fake
def _(
    inputs: Sequence[Tensor],
    sizes: Sequence[int],
    scale: float,
    o: Tensor | None,
    lse: Tensor,
    groups: Sequence[Tensor],
    do: Tensor | None,
    dlse: Tensor | None,
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in Inputs(*inputs)[:4]]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, ctx.sizes, ctx.scale = inputs
    o, lse, *groups = output
    mixture = _call(ctx.sizes, ctx.scale).mixture
    ctx.mark_non_differentiable(*([lse] if mixture else []), *groups)
    ctx.has_output = not mixture
    ctx.save_for_backward(*tensors, *([] if mixture else [o]), lse, *groups)


def _differentiate(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    inputs, rest = saved[:5], saved[5:]
    o, rest = (rest[0], rest[1:]) if ctx.has_output else (None, rest)
    lse, *groups = rest
    given = (inputs, ctx.sizes, ctx.scale, o, lse, groups, grads[0], grads[1])
    return [*_backward(*given), None], None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def _call(sizes: Sequence[int], scale: float) -> Call:
    time, block, mixture, by_block = sizes
    return Call(time, block, scale, bool(mixture), bool(by_block))
