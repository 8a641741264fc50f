"""Windows of k chunks of every variant, in float64: loss and gradients of a training step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from variant_cases import VARIANTS

from lightning_modules.base import AdapterModule, Chunk

Gradients = dict[str, Tensor]


def use_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing be computed in float32: Llama's norms and the loss would be."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    monkeypatch.setattr(
        LlamaRMSNorm,
        "forward",
        lambda self, x: torch.nn.functional.rms_norm(
            x, x.shape[-1:], self.weight, self.variance_epsilon
        ),
    )


def make_window_case(
    name: str, folder: Path, chunks: int, **data: Any
) -> tuple[AdapterModule, list[Chunk]]:
    """A variant in which every parameter does something, and the first chunks of its epoch.

    Files of the variant's own data end and begin inside of these chunks, and some are padded.
    """
    source = VARIANTS[name].data(folder, tbptt=1, **data)
    source.prepare_data()
    source.setup("fit")
    torch.manual_seed(0)
    module = VARIANTS[name].module()
    module.build_for(source)
    module.log = lambda *args, **kwargs: None  # there is no trainer
    add_noise(module)
    loader = source.train_dataloader()
    found = [in_float64(chunk) for (chunk,) in loader][:chunks]
    assert len(found) == chunks
    return module.double().train(), found


@torch.no_grad()
def add_noise(module: AdapterModule) -> AdapterModule:
    """Leave no parameter at a special value."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module


def in_float64(chunk: Chunk) -> Chunk:
    """The chunk with its floating tensors in float64."""
    floats = {k: v for k, v in chunk.items() if isinstance(v, Tensor) and v.is_floating_point()}
    return {**chunk, **{name: value.double() for name, value in floats.items()}}


def window_loss(module: AdapterModule, window: list[Chunk], seed: int = 0) -> Tensor:
    """What a training step would go backward from; the step stays open."""
    torch.manual_seed(seed)  # the noise of flow matching
    module.streams.begin_step("train")
    return module.training_step(window, 0)


def step(module: AdapterModule, window: list[Chunk], seed: int = 0) -> Gradients:
    """Gradients of a training step, committed; no parameter moves."""
    module.zero_grad()
    window_loss(module, window, seed).backward()
    module.streams.commit()
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def recompute_layers(module: AdapterModule) -> None:
    """Turn activation checkpointing on."""
    if isinstance(module.model, PreTrainedModel):
        model = module.model
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    else:
        module.model.config = replace(module.model.config, gradient_checkpointing=True)


class SavedBytes:
    """Bytes of the storages that autograd keeps while this context is open, parameters left out."""

    def __init__(self, module: AdapterModule) -> None:
        own = {p.untyped_storage().data_ptr() for p in module.parameters()}
        self._sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                self._sizes[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()  # itself, it would hold on to the graph that saves it

        self._hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        self._hooks.__exit__(*args)

    @property
    def total(self) -> int:
        """So far."""
        return sum(self._sizes.values())
