"""Every weight gets a gradient in every step, whatever the rows of a process happen to do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def reached(output: Tensor, *others: Tensor | None) -> Tensor:
    """`output`, from which a gradient of zero reaches the others.

    A weight through which a layer writes has no gradient in a step in which nothing that was
    written is read, and whether that is so depends on the rows. Processes that train together
    would wait for each other's gradients, or add up different ones.

    Args:
        output: of a layer, any shape.
        *others: tensors that it may not depend on; None is left out.
    """
    tensors = [other for other in others if other is not None and other.requires_grad]
    return _Reached.apply(output, *tensors) if tensors else output


class _Reached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, *others: Tensor) -> Tensor:
        ctx.others = [(other.shape, other.dtype) for other in others]
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(grad.new_zeros(shape, dtype=dtype) for shape, dtype in ctx.others)
