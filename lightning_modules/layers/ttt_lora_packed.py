"""Weights of the adapters of a decoder layer, cast and laid out for the kernels all at once.

A layer has several groups of adapters with nine parameters in each: to cast, pad and concatenate
them one by one costs the host of a GPU more than the kernels cost the GPU. Nothing is kept from
one call to the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_modules.layers.ttt_lora import Packed, TTTLoRACell

Grads = Sequence[Tensor | None]


class GroupShape(NamedTuple):
    """Sizes of the packed weights of a group, whose linear layers have equal inputs.

    Attributes:
        count: G.
        d: inner size.
        inputs: of the linear layers.
        outputs: of each linear layer.
        norm: whether there are norms.
        rows: P, rows of the projections: a multiple of 8, as a GPU's matrix product wants it.
        width: columns of what is read, a multiple of 8 likewise.
        lengths: numbers in the projections and in each output.
    """

    count: int
    d: int
    inputs: int
    outputs: tuple[int, ...]
    norm: bool
    rows: int
    width: int
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, cells: Sequence[TTTLoRACell]) -> GroupShape:
        """The sizes of these cells."""
        first, count, d = cells[0], len(cells), cells[0].inner_dim
        outputs = tuple(cell.theta_out.out_features for cell in cells)
        inputs, norm = first.theta_k.in_features, first.norm is not None
        rows, width = 3 * count * d + -3 * count * d % 8, d + -d % 8
        lengths = (rows * inputs, *(n * width for n in outputs))
        return cls(count, d, inputs, outputs, norm, rows, width, lengths)

    def cut_rows(self, weight: Tensor) -> list[Tensor]:
        """Of projections `[P, in]` each cell's keys, queries, values, `[d, in]`."""
        used = 3 * self.count
        return list(weight.split_with_sizes([*[self.d] * used, self.rows - used * self.d])[:used])


class Packing:
    """How the weights of the groups of an adapter in a decoder layer are packed.

    Args:
        groups: cells with equal options, for each group as in `project`.
    """

    def __init__(self, groups: Sequence[Sequence[TTTLoRACell]]) -> None:
        self.groups = groups
        self.shapes = [GroupShape.of(cells) for cells in groups]
        self.rates_per_token = groups[0][0].lr_token is not None

    def pack(self, dtype: torch.dtype) -> list[Packed] | None:
        """The packed weights of each group; None if they cannot be packed together.

        They can if all are whole, on one device and in one dtype, and have no rates per token.

        Args:
            dtype: of the products; fast weights, norms and step sizes are float32 (float64 if it
                is).
        """
        if self.rates_per_token:
            return None
        flat = self._parameters()
        if {*map(type, flat)} != {nn.Parameter}:
            return None
        if len({x.dtype for x in flat}) > 1 or len({x.device for x in flat}) > 1:
            return None
        parts = iter(_Pack.apply(self.shapes, dtype, *flat))
        return [
            Packed(
                weights=next(parts),
                outputs=[next(parts) for _ in shape.outputs],
                base=next(parts),
                norm=next(parts) if shape.norm else None,
                eta=next(parts),
            )
            for shape in self.shapes
        ]

    def _parameters(self) -> list[Any]:
        """Maps, outputs, fast weights and norms, gates: each group by group; None: not there."""
        maps, outputs, exact, gates = [], [], [], []
        for cells in self.groups:
            # Looked up here, as a module's own look-up of 63 parameters costs as much as ten ops.
            modules, own = [cell._modules for cell in cells], [cell._parameters for cell in cells]
            for name in ("theta_k", "theta_q", "theta_v"):
                maps += [found[name]._parameters.get("weight") for found in modules]
            outputs += [found["theta_out"]._parameters.get("weight") for found in modules]
            exact += [found[name] for found in own for name in ("w_base", "b_base")]
            norms = [x._parameters for found in modules if (x := found.get("norm")) is not None]
            exact += [norm.get(name) for norm in norms for name in ("weight", "bias")]
            gates += [found["lr_gate"] for found in own]
        return [*maps, *outputs, *exact, *gates]


class _Pack(torch.autograd.Function):
    """See `Packing`; each gradient is cast and cut as the weights were."""

    @staticmethod
    def forward(
        ctx: Any, shapes: list[GroupShape], dtype: torch.dtype, *flat: Tensor
    ) -> tuple[Tensor, ...]:
        cells = sum(shape.count for shape in shapes)
        maps, outputs, others = flat[: 3 * cells], flat[3 * cells : 4 * cells], flat[4 * cells :]
        weights, thetas = _products(shapes, dtype, maps, outputs)
        exactly = torch.promote_types(dtype, torch.float32)
        exact = torch._utils._flatten_dense_tensors(others).to(exactly)
        sizes = [n for s in shapes for n in (s.count * (s.d + 1) * s.d, 2 * s.count * s.d * s.norm)]
        *parts, gates = exact.split_with_sizes([*sizes, cells])
        eta = gates.sigmoid()
        results: list[Tensor] = []
        rates, bases, norms = (
            eta.split_with_sizes([s.count for s in shapes]),
            parts[::2],
            parts[1::2],
        )
        for shape, weight, base, norm, rate in zip(
            shapes, weights, bases, norms, rates, strict=True
        ):
            results += [weight, *(thetas.pop(0) for _ in shape.outputs)]
            results.append(base.view(shape.count, shape.d + 1, shape.d))
            results += [norm.view(shape.count, 2, shape.d)] if shape.norm else []
            results.append(rate)
        ctx.shapes, ctx.dtype = shapes, flat[0].dtype
        ctx.save_for_backward(eta)
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        rest = iter(grads)
        products: list[Tensor | None] = []
        exact: list[Tensor | None] = []
        rates: list[Tensor | None] = []
        for shape in ctx.shapes:
            products += [next(rest) for _ in range(1 + shape.count)]
            exact += [next(rest), next(rest) if shape.norm else None]
            rates.append(next(rest))
        found = iter(_as(products, ctx.dtype))
        maps: list[Tensor | None] = []
        outputs: list[Tensor | None] = []
        for shape in ctx.shapes:
            weight = next(found)
            none = [None] * (3 * shape.count)
            maps += none if weight is None else shape.cut_rows(weight)
            thetas = [next(found) for _ in shape.outputs]
            outputs += [None if x is None else x[:, : shape.d] for x in thetas]
        others = _cut_exact(ctx.shapes, _as(exact, ctx.dtype))
        gates = _of_gates(ctx.shapes, rates, *ctx.saved_tensors, ctx.dtype)
        return None, None, *maps, *outputs, *others, *gates


def _products(
    shapes: Sequence[GroupShape],
    dtype: torch.dtype,
    maps: Sequence[Tensor],
    outputs: Sequence[Tensor],
) -> tuple[list[Tensor], list[Tensor]]:
    """Projections `[P, in]` of each group and `theta_out` `[out, width]` of each cell."""
    lengths = [n for shape in shapes for n in shape.lengths]
    buffer = torch.zeros(sum(lengths), dtype=dtype, device=maps[0].device)
    parts = iter(buffer.split_with_sizes(lengths))
    weights, thetas, rooms = [], [], []
    for shape in shapes:
        weights.append(next(parts).view(shape.rows, shape.inputs))
        rooms += shape.cut_rows(weights[-1])
        thetas += [next(parts).view(n, shape.width) for n in shape.outputs]
    given, padded = [*maps], []
    for theta, x in zip(thetas, outputs, strict=True):
        if theta.shape == x.shape:
            rooms.append(theta)
            given.append(x)
        else:
            padded.append((theta[:, : x.shape[1]], x))
    torch._foreach_copy_(rooms, given)
    for room, x in padded:  # other strides than x has: never one launch for all
        room.copy_(x)
    return weights, thetas


def _as(grads: Grads, dtype: torch.dtype) -> list[Tensor | None]:
    """Gradients in the dtype of the parameters: one launch for all."""
    found = [x for x in grads if x is not None and x.dtype != dtype]
    cast = [torch.empty_like(x, dtype=dtype) for x in found]
    if found:
        torch._foreach_copy_(cast, found)
    rest = iter(cast)
    return [x if x is None or x.dtype == dtype else next(rest) for x in grads]


def _cut_exact(shapes: Sequence[GroupShape], grads: Grads) -> list[Tensor | None]:
    """Gradients of fast weights and norms of each group: views."""
    found: list[Tensor | None] = []
    for shape, base, norm in zip(shapes, grads[::2], grads[1::2], strict=True):
        cells = [None] * shape.count if base is None else base.unbind(0)
        for x in cells:
            found += [None, None] if x is None else [x[:-1], x[-1]]
        if shape.norm:
            found += (
                [None] * (2 * shape.count)
                if norm is None
                else [x for cell in norm.unbind(0) for x in cell.unbind(0)]
            )
    return found


def _of_gates(
    shapes: Sequence[GroupShape], grads: Grads, eta: Tensor, dtype: torch.dtype
) -> list[Tensor | None]:
    """Gradients of the cells' gates from those of the groups' step sizes."""
    if all(x is None for x in grads):
        return [None] * len(eta)
    given = zip(shapes, grads, strict=True)
    together = torch.cat([eta.new_zeros(s.count) if x is None else x for s, x in given])
    of_gates = torch.ops.aten.sigmoid_backward(together, eta)
    return list(of_gates.to(dtype).split(1))
