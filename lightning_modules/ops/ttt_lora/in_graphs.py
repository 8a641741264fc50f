"""The kernels of TTT-as-LoRA as operations in the graphs of `torch.compile`.

Traced, launches would be taken apart, and the torch backend's loop over mini-batches would be
unrolled into every graph. Each function here is one node, whatever T is; the shapes of its results
are all that the compiler knows of it.

A schema has no lists with gaps: the tensors that a call has come without those that it has not, and
`given` says which (1 or 0 for each place of `_Places`, then for each tensor of tokens).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_modules.ops.nodes import there, unshared, with_gaps
from lightning_modules.ops.ttt_lora.call import Call, held_get_gradients
from lightning_modules.ops.ttt_lora.plan import Plan

Given = Sequence[Tensor | None]


class _Places(NamedTuple):
    """How many places there are of each kind, in this order; tokens follow."""

    differentiable: int = 8  # eta, base, the start, k, v, eta of the open mini-batch, two norms
    integers: int = 6  # the state's three, entries, rows and mask of the plan


PLACES = _Places()


class _Unpacked(NamedTuple):
    """The inputs of `_Fused` from eta on, the state's integers, and the call."""

    inputs: list[Tensor | None]
    before: list[Tensor | None]
    call: Call

    @property
    def tokens(self) -> list[Tensor]:
        return there(self.inputs[PLACES.differentiable :])

    def with_gradients(self, of_state: bool) -> list[Tensor | None]:
        """The inputs that get one; the open mini-batch only where something asks for it."""
        held = held_get_gradients(self.inputs[2], self.inputs[6], of_state)
        return [x if held or not 3 <= n < 6 else None for n, x in enumerate(self.inputs)]


def in_graph(
    call: Call, before: Given, eta: Tensor, base: Tensor, start: Tensor | None, others: Given
) -> Sequence[Tensor]:
    """What `_Fused` returns, as one node of a graph.

    Args:
        call: of the kernels.
        before: the state's integers.
        eta: step sizes.
        base: w_base and below it b_base.
        start: the change at the beginning; None: zero.
        others: the open mini-batch, norm, output norm, tokens, as `_Fused` takes them.
    """
    plan, options = call.plan, (call.mode_b, call.unit, call.residual)
    flags = (plan.entries, plan.rows, plan.mask)
    places = [eta, base, start, *others[:5], *before, *flags, *others[5:]]
    sizes = [call.size, call.width, plan.blocks, plan.slots, plan.tile, *(int(x) for x in options)]
    given = [int(x is not None) for x in places]
    return _forward(there(places), given, sizes, [call.eps, call.output_eps])[:6]


@torch.library.custom_op("fast_weights::ttt_lora", mutates_args=())
def _forward(
    tensors: Sequence[Tensor], given: Sequence[int], sizes: Sequence[int], eps: Sequence[float]
) -> list[Tensor]:
    from lightning_modules.ops.ttt_lora.kernels.launch import forward

    found = _unpack(tensors, given, sizes, eps)
    eta, base, start, *rest = found.inputs
    assert eta is not None and base is not None
    held, norm, output_norm = rest[:3], rest[3], rest[4]
    state = (found.before, eta, base, start, held)
    return list(forward(found.call, *state, norm, output_norm, found.tokens))


@_forward.register_fake
def _(
    tensors: Sequence[Tensor], given: Sequence[int], sizes: Sequence[int], eps: Sequence[float]
) -> list[Tensor]:
    from lightning_modules.ops.ttt_lora.kernels.launch import room_forward

    found = _unpack(tensors, given, sizes, eps)
    base = found.inputs[1]
    assert base is not None
    return list(room_forward(found.call, base, found.tokens))


@torch.library.custom_op("fast_weights::ttt_lora_backward", mutates_args=())
def _backward(
    tensors: Sequence[Tensor],
    given: Sequence[int],
    sizes: Sequence[int],
    eps: Sequence[float],
    kept: Sequence[Tensor],
    grads: Sequence[Tensor],
    of_outputs: Sequence[int],
    of_state: bool,
) -> list[Tensor]:
    from lightning_modules.ops.ttt_lora.kernels.launch import backward

    inputs, before, call = _unpack(tensors, given, sizes, eps)
    found = backward(call, before, inputs, kept, with_gaps(grads, of_outputs), of_state)
    return unshared(there(found))


@_backward.register_fake
def _(
    tensors: Sequence[Tensor],
    given: Sequence[int],
    sizes: Sequence[int],
    eps: Sequence[float],
    kept: Sequence[Tensor],
    grads: Sequence[Tensor],
    of_outputs: Sequence[int],
    of_state: bool,
) -> list[Tensor]:
    wanted = _unpack(tensors, given, sizes, eps).with_gradients(of_state)
    return [x.new_empty(x.shape) for x in there(wanted)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, *ctx.options = inputs
    places = with_gaps(tensors, ctx.options[0])
    ctx.of_state = any(x is not None and x.requires_grad for x in places[2:6])
    ctx.save_for_backward(*tensors, *output[6:])
    ctx.mark_non_differentiable(output[5])


def _differentiate(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    *tensors, kept, kept_open = ctx.saved_tensors
    given, count = ctx.options[0], PLACES.differentiable
    of_outputs = [int(x is not None) for x in grads[:5]]
    options = ([kept, kept_open], there(grads[:5]), of_outputs, ctx.of_state)
    found = iter(_backward(tensors, *ctx.options, *options))
    wanted = _unpack(tensors, *ctx.options).with_gradients(ctx.of_state)
    inputs = [None if x is None else next(found) for x in wanted]
    places = [*inputs[:count], *[None] * PLACES.integers, *inputs[count:]]
    return [x for x, has in zip(places, given, strict=True) if has], None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def _unpack(
    tensors: Sequence[Tensor], given: Sequence[int], sizes: Sequence[int], eps: Sequence[float]
) -> _Unpacked:
    """What `in_graph` was given, from what a schema can hold of it."""
    first, last = PLACES.differentiable, sum(PLACES)
    places = with_gaps(tensors, given)
    entries, rows, mask = places[first + 3 : last]
    size, width, blocks, slots, tile, mode_b, unit, residual = sizes
    plan = Plan(blocks, slots, tile, entries, rows, mask, None)
    call = Call(size, bool(mode_b), plan, width, eps[0], bool(unit), eps[1], bool(residual))
    return _Unpacked([*places[:first], *places[last:]], places[first : first + 3], call)
