"""The mean over the targets of all processes, so that how streams are dealt out does not matter."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def over_processes(losses: Tensor, targets: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """Losses whose average over processes is the mean over all targets, and that mean.

    Data-parallel training averages the gradients of W processes. Process r has the mean `l_r` over
    its `n_r` targets; what it has to contribute is `W n_r l_r / sum_s n_s`, or rows at the end of
    their files would count more than others. One transfer, in which nothing waits for the device.

    Args:
        losses: mean loss of each of the k chunks of a step on this process, `[k]`.
        targets: gives over how many targets each of them is the mean, `[k]`.

    Returns:
        Losses to differentiate, `[k]`, in a single process the losses themselves; and (without
        gradient) the mean over all targets of the step, a scalar: chunks without any, in which
        files have ended, do not lower it.
    """
    here = targets().to(torch.promote_types(losses.dtype, torch.float32))
    both = torch.stack([here, here * losses.detach()])
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    world_size = torch.distributed.get_world_size() if distributed else 1
    if world_size > 1:
        torch.distributed.all_reduce(both)
        losses = losses * (world_size * here / both[0].clamp(min=1)).to(losses.dtype)
    count, total = both.sum(1)
    return losses, total / count.clamp(min=1)
