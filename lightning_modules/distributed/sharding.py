"""Parameters that are shared out among processes: FSDP2 (`fully_shard`) for every variant."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

LAYERS = "layers"
"""Name of the list of decoder layers in the models of transformers and in ours."""


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard a model in place: every decoder layer is a unit, and the rest is one.

    Layers are gathered when they run, and what is trained of them is averaged over the processes
    when their gradients are there; frozen parameters are sharded, too. Fast state is no parameter:
    every process keeps that of its own rows, whole and in float32. All processes get the values of
    the first one.

    Args:
        model: whose forward call is the root.
        mesh: one-dimensional.

    Raises:
        ValueError: a parameter has no dimension along which it could be sharded.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() == 0:
            raise ValueError(f"{name} is a scalar, which FSDP2 cannot shard: give it one dimension")
    for unit in [*decoder_layers(model), model]:
        _agree(unit, mesh)
        fully_shard(unit, mesh=mesh)


def decoder_layers(model: nn.Module) -> Iterator[nn.Module]:
    """The layers of every outermost list called `layers`, in order."""
    for name, child in model.named_children():
        if name == LAYERS and isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from decoder_layers(child)


def is_sharded(module: nn.Module) -> bool:
    """Whether a process holds a part of the parameters only."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def _agree(unit: nn.Module, mesh: DeviceMesh) -> None:
    """Give all processes the first one's values of what is not sharded yet, on the device."""
    device = torch.device(mesh.device_type)
    whole = [p for p in unit.parameters() if not isinstance(p, DTensor)]
    for tensor in chain(whole, unit.buffers()):
        tensor.data = tensor.data.to(device)
        torch.distributed.broadcast(tensor.data, 0, group=mesh.get_group())
