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
        targets: gives over how many targets each of them is the mean, `[k]`; asked in several
            processes only.

    Returns:
        Losses to differentiate, and (without gradient) the means over all processes, `[k]` each;
        in a single process the losses themselves.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return losses, losses.detach()
    world_size = torch.distributed.get_world_size()
    if world_size == 1:
        return losses, losses.detach()
    here = targets().to(torch.promote_types(losses.dtype, torch.float32))
    both = torch.stack([here, here * losses.detach()])
    torch.distributed.all_reduce(both)
    count = both[0].clamp(min=1)
    return losses * (world_size * here / count).to(losses.dtype), both[1] / count
