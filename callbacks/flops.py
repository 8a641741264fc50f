"""FLOPs of a training step, counted on tensors without memory.

The step itself is not touched: a mode that watches it would keep compiled attention from running,
and take other kernels than the steps after it, so that a resumed run would differ in its bits.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_modules.base import AdapterModule
from lightning_modules.streams import FastState

logger = logging.getLogger(__name__)


def count_step(module: AdapterModule, batch: Sequence[Mapping[str, Any]]) -> int | None:
    """FLOPs of forward and backward of a batch, or None where they cannot be counted.

    Those of products and attentions as torch's operations compute them, whichever kernels the step
    takes: of all pairs of tokens, masked ones, too, and without what activation checkpointing
    repeats.

    Args:
        module: with a model.
        batch: its chunks.
    """
    try:
        tensors = {f"module.{name}": x for name, x in _on_meta(module).items()}
        with _without_checkpointing(module), FlopCounterMode(display=False) as counter:
            for chunk in batch:
                given = {name: _meta(x) for name, x in chunk.items()}
                loss: Tensor = torch.func.functional_call(_Loss(module), tensors, (given,))
                loss.backward()
    except Exception as error:  # a step may look at numbers, which these tensors have not
        logger.info("the FLOPs of a step are not counted: %s", error)
        return None
    return int(counter.get_total_flops())


@contextmanager
def _without_checkpointing(module: nn.Module) -> Iterator[None]:
    """It looks for random numbers of the device, of which there is none."""
    layers: list[Any] = [
        layer for layer in module.modules() if getattr(layer, "gradient_checkpointing", False)
    ]
    for layer in layers:
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = True


class _Loss(nn.Module):
    """The loss of a chunk that continues nothing."""

    def __init__(self, module: AdapterModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, chunk: dict[str, Any]) -> Tensor:
        return self.module.chunk_loss(chunk, FastState(), None)


def _on_meta(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    parameters = {
        name: nn.Parameter(_meta(x), requires_grad=x.requires_grad)
        for name, x in module.named_parameters()
    }
    return parameters | {name: _meta(x) for name, x in module.named_buffers()}


def _meta(x: Any) -> Any:
    """Without memory, in one floating-point dtype: autocast does not reach these tensors."""
    if not torch.is_tensor(x):
        return x
    return torch.empty_like(
        x, device="meta", dtype=torch.float32 if x.is_floating_point() else None
    )
