"""Processes that share the tokens of a row: what they tell each other, with gradients.

Every process p of a group of P has the p-th of P parts of each row, all of the same length, and a
loss of its own; what is differentiated is the **sum of their losses**. The gradient of a tensor
that a process has sent is therefore the sum of what all processes have at their copies of it, and
the gradient of a learned weight is the sum of those at its P copies.

Messages must be alike on all processes, forward and backward: no result may be left out of the
graph on some of them (multiply by zero, or choose by `torch.where`).
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, all_gather, all_reduce, all_to_all_single


class _Sum(torch.autograd.Function):
    """See `sum_over`: every loss depends on the sum, so that its gradients are summed, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.clone(memory_format=torch.contiguous_format)
        all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(grad, ctx.group), None


class _Gather(torch.autograd.Function):
    """See `gather_from`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(group.size())]
        all_gather(parts, x, group=group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(grad, ctx.group)[ctx.group.rank()], None


class _Exchange(torch.autograd.Function):
    """See `exchange`: it is its own inverse, and so its own gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        x = x.contiguous()
        received = torch.empty_like(x)
        all_to_all_single(received, x, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Exchange.apply(grad, ctx.group), None


def sum_over(x: Tensor, group: ProcessGroup) -> Tensor:
    """`sum_p x_p` on every process p."""
    return _Sum.apply(x, group)


def gather_from(x: Tensor, group: ProcessGroup) -> Tensor:
    """The tensors of all processes on every one of them, `[P, ...]`."""
    return _Gather.apply(x, group)


def exchange(x: Tensor, group: ProcessGroup) -> Tensor:
    """`y_p[q] = x_q[p]`: part q of `[P, ...]` goes to process q."""
    return _Exchange.apply(x, group)


def gather_tokens(x: Tensor, group: ProcessGroup) -> Tensor:
    """The whole rows `[B, P T, ...]` of which every process has its part, `[B, T, ...]`."""
    return gather_from(x, group).transpose(0, 1).flatten(1, 2)


def gather_flags(
    mask: Tensor | None, document_ids: Tensor | None, group: ProcessGroup
) -> tuple[Tensor | None, Tensor | None]:
    """Mask and documents of the whole rows, `[B, P T]`, from those of the own tokens, `[B, T]`.

    Whether there are any must be the same on all processes.
    """
    whole_mask = None if mask is None else gather_tokens(mask.byte(), group).bool()
    return whole_mask, None if document_ids is None else gather_tokens(document_ids, group)


def own_part(length: int, group: ProcessGroup) -> slice:
    """Where the own tokens, `length` of them, stand in the whole rows."""
    return slice(group.rank() * length, (group.rank() + 1) * length)
