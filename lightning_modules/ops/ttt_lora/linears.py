"""Frozen linear layers of one input with TTT-LoRA around them, as one node of autograd.

Taken apart they are a node for each product, and every gradient of the input is written and then
added to the others'. Here each product adds to what is there, in both directions.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from lightning_modules.ops.states import TTTLoRAState
from lightning_modules.ops.ttt_lora.call import Call
from lightning_modules.ops.ttt_lora.fused import kernel_backward, kernel_forward, prepare, state_of


class Linears(NamedTuple):
    """Linear layers whose own weights get no gradient, and what their adapters have around them.

    Attributes:
        x: input of all, `[B, T, in]`.
        projections: of x to keys, queries and values, `[P, in]`.
        weights: of each layer, `[out, in]`.
        biases: of each layer, `[out]`; None: it has none.
        outputs: `theta_out` of each adapter, `[out, d]`, or with columns of zeros behind d. All
            are in the dtype of x.
        scaling: of what the adapters add.
    """

    x: Tensor
    projections: Tensor
    weights: Sequence[Tensor]
    biases: Sequence[Tensor | None]
    outputs: Sequence[Tensor]
    scaling: float


def add_reads(linears: Linears, read: Tensor) -> tuple[Tensor, ...]:
    """`x W^T + b + scaling read theta_out^T` of each layer, `[B, T, out]`.

    Args:
        linears: G layers.
        read: `[B, T, G, width]`, width at most that of `outputs`.
    """
    layers = zip(linears.weights, linears.biases, linears.outputs, read.unbind(2), strict=True)
    width = read.shape[-1]
    return tuple(
        linear(linears.x, weight, bias) + linears.scaling * linear(part, output[:, :width])
        for weight, bias, output, part in layers
    )


def run_linears(
    linears: Linears,
    call: Call,
    projected: Tensor,
    eta: Tensor,
    base: Tensor,
    norm: Tensor | None,
    output_norm: Tensor | None,
    state: TTTLoRAState | None,
) -> tuple[tuple[Tensor, ...], TTTLoRAState]:
    """`add_reads` of what the kernels read, and the next state.

    Args:
        linears: G layers; the gradient of `projected` goes on to x and to the projections.
        call: as in `fused.run`, as are the others.
        projected: `x projections^T`.
    """
    before, change, others = prepare(base, (projected.detach(),), norm, output_norm, state)
    count, given = len(linears.weights), (*linears[:2], eta, base, *change, *linears.outputs)
    found = _Linears.apply(call, before, linears, *given, *others)
    return found[:count], state_of(call, found[count:])


class _Linears(torch.autograd.Function):
    """See `run_linears`; differentiable once."""

    @staticmethod
    def forward(
        ctx: Any,
        call: Call,
        before: tuple[Tensor | None, ...],
        linears: Linears,
        x: Tensor,
        projections: Tensor,
        eta: Tensor,
        base: Tensor,
        dw: Tensor | None,
        db: Tensor | None,
        *rest: Tensor | None,
    ) -> tuple[Tensor, ...]:
        count, scaling = len(linears.weights), linears.scaling
        outputs, others = rest[:count], rest[count:]
        (read, *after), saved = kernel_forward(call, before, eta, base, dw, db, *others)
        results = []
        layers = zip(linears.weights, linears.biases, linears.outputs, strict=True)
        for (weight, bias, output), part in zip(layers, _parts(read), strict=True):
            y = linear(x, weight, bias)
            y.view(-1, y.shape[-1]).addmm_(part, output.t(), alpha=scaling)
            results.append(y)
        ctx.call, ctx.count, ctx.scaling = call, count, scaling
        ctx.save_for_backward(x, projections, read, *linears.weights, *outputs, *saved)
        ctx.mark_non_differentiable(after[-1])
        ctx.set_materialize_grads(False)
        return *results, *after

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        count, needed = ctx.count, ctx.needs_input_grad
        x, projections, read, *rest = ctx.saved_tensors
        weights, outputs, saved = rest[:count], rest[count : 2 * count], rest[2 * count :]
        of_read, of_outputs, of_x = _of_layers(
            grads[:count], read, weights if needed[3] else (None,) * count, outputs, ctx.scaling
        )
        of_state = any(needed[7:9]) or any(needed[9 + count : 12 + count])
        found = kernel_backward(ctx.call, saved, [of_read, *grads[count : count + 4]], of_state)
        *of_others, of_projected = found
        assert of_projected is not None
        rows = of_projected.flatten(0, 1)
        of_projections = rows.t() @ x.flatten(0, 1) if needed[4] else None
        if needed[3]:
            of_x = rows @ projections if of_x is None else of_x.addmm_(rows, projections)
            of_x = of_x.view(x.shape)
        inner = (*of_others[:4], *of_outputs, *of_others[4:])
        return None, None, None, of_x, of_projections, *inner, None


def _parts(read: Tensor) -> tuple[Tensor, ...]:
    """Rows of each adapter, `[B * T, width]`, of `[B, T, G, width]`."""
    return read.flatten(0, 1).unbind(1)


def _of_layers(
    grads: Sequence[Tensor | None],
    read: Tensor,
    weights: Sequence[Tensor | None],
    outputs: Sequence[Tensor],
    scaling: float,
) -> tuple[Tensor | None, list[Tensor | None], Tensor | None]:
    """Gradients of what is read, of `theta_out`, and of x by the layers' own weights.

    Args:
        grads: of the layers' outputs; None: zero.
        read: `[B, T, G, width]`.
        weights: of the layers; None: no gradient of x is asked for.
        outputs: `theta_out` of each.
        scaling: of what is added.
    """
    if all(grad is None for grad in grads):
        return None, [None] * len(grads), None
    of_outputs: list[Tensor | None] = []
    of_read, of_x = torch.empty_like(read), None
    layers = zip(grads, weights, outputs, _parts(read), _parts(of_read), strict=True)
    for grad, weight, output, part, of_part in layers:
        if grad is None:
            of_part.zero_()
            of_outputs.append(None)
            continue
        rows = grad.flatten(0, 1)
        of_part.addmm_(rows, output, beta=0, alpha=scaling)
        of_output = torch.empty_like(output)
        of_outputs.append(of_output.addmm_(rows.t(), part, beta=0, alpha=scaling))
        if weight is not None:
            of_x = rows @ weight if of_x is None else of_x.addmm_(rows, weight)
    return of_read, of_outputs, of_x
