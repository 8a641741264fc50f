"""What TTT-as-LoRA adds to a linear layer, into the layer's own output where nobody else has it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules


def add_product(y: Tensor, read: Tensor, weight: Tensor, scaling: float, overwrite: bool) -> Tensor:
    """`y + scaling read weight^T`.

    Args:
        y: `[B, T, out]`.
        read: `[B, T, width]`, in the dtype of y.
        weight: `[out, width]`, likewise.
        scaling: factor.
        overwrite: add into y, see `may_overwrite`.
    """
    return _AddProduct.apply(y, read, weight, scaling, overwrite)


def may_overwrite(layer: nn.Module, y: Tensor) -> bool:
    """Whether nobody but the caller has the output y of a layer.

    A plain linear layer without hooks keeps none of its output for its backward pass. A dispatch
    mode (selective checkpointing) may keep it, and a view would be copied by autograd.
    """
    hooks = layer._forward_hooks or modules._global_forward_hooks
    alone = type(layer) is nn.Linear and not hooks and y.is_contiguous() and not y._is_view()
    leaf = y.is_leaf and y.requires_grad
    return alone and not leaf and not torch._C._len_torch_dispatch_stack()


class _AddProduct(torch.autograd.Function):
    """See `add_product`."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, read: Tensor, weight: Tensor, scaling: float, overwrite: bool
    ) -> Tensor:
        rows, tokens = y.flatten(0, 1), read.flatten(0, 1)
        ctx.save_for_backward(read, weight)
        ctx.scaling = scaling
        if not overwrite:
            return torch.addmm(rows, tokens, weight.t(), alpha=scaling).view(y.shape)
        rows.addmm_(tokens, weight.t(), alpha=scaling)
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        read, weight = ctx.saved_tensors
        rows = grad.flatten(0, 1)
        of_read = (rows @ weight).view(read.shape)
        of_weight = rows.t() @ read.flatten(0, 1)
        if ctx.scaling != 1:
            of_read, of_weight = of_read * ctx.scaling, of_weight * ctx.scaling
        return grad, of_read, of_weight, None, None
