"""What TTT-as-LoRA adds to a linear layer, and what that layer leaves to it."""

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


def is_plain(layer: nn.Module, dtype: torch.dtype) -> bool:
    """Whether a call of a layer is the product with a frozen weight of this dtype, nothing else.

    Hooks, wrappers (which take the place of `forward`) and dispatch modes would miss the call.
    """
    if type(layer) is not nn.Linear or "forward" in layer.__dict__:
        return False
    if (
        layer._forward_pre_hooks
        or layer._forward_hooks
        or layer._backward_pre_hooks
        or layer._backward_hooks
        or modules._global_forward_pre_hooks
        or modules._global_forward_hooks
        or modules._global_backward_pre_hooks
        or modules._global_backward_hooks
        or torch._C._len_torch_dispatch_stack()
    ):
        return False
    own = layer._parameters
    if "weight" not in own or "bias" not in own:  # flattened or replaced: no parameters any more
        return False
    weight, bias = own["weight"], own["bias"]
    return _is_frozen(weight, dtype) and (bias is None or _is_frozen(bias, dtype))


def _is_frozen(x: Tensor | None, dtype: torch.dtype) -> bool:
    return type(x) is nn.Parameter and not x.requires_grad and x.dtype == dtype


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
