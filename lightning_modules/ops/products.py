"""Matrix products of 16-bit numbers that are accumulated, and stay, in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """`a @ b` of numbers of a dtype, which is what tensor cores are fast at.

    Args:
        a: `[..., M, K]`, of any floating-point dtype.
        b: `[..., K, N]`, with the same leading axes.
        dtype: to which both are rounded first. bfloat16 gives a float32 result, and so do the
            products of the backward pass, whose gradients are rounded in turn; other dtypes
            multiply as usual.

    Returns:
        `[..., M, N]`, float32 if dtype is bfloat16, else dtype.
    """
    if dtype == torch.bfloat16:
        return _Product.apply(a, b)
    return a.to(dtype) @ b.to(dtype)


class _Product(torch.autograd.Function):
    """`product` of bfloat16 numbers: autograd has no derivative for a dtype of the result."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.dtypes = a.dtype, b.dtype
        a, b = a.bfloat16(), b.bfloat16()
        ctx.save_for_backward(a, b)
        return wide_product(a, b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        grad, (of_a, of_b) = grad.bfloat16(), ctx.dtypes
        wanted = ctx.needs_input_grad
        return (
            wide_product(grad, b.mT).to(of_a) if wanted[0] else None,
            wide_product(a.mT, grad).to(of_b) if wanted[1] else None,
        )


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """The float32 product of bfloat16 matrices; only CUDA has it as one operation."""
    if not a.is_cuda:
        return a.float() @ b.float()
    if a.dim() == 3:
        return torch.bmm(a, b, out_dtype=torch.float32)
    out = torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out_dtype=torch.float32)
    return out.unflatten(0, a.shape[:-2])
