"""What of a model is its base, whatever was put into it; which base an adapter belongs to."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lightning_modules.adapters.base import BASE, BaseAttentionAdapter
from lightning_modules.adapters.fingerprint import fingerprint
from lightning_modules.layers.in_place_mlp import InPlaceMLP

PEFT_BASE = "base_layer"
"""Where peft's layers keep what they wrap."""


def base_parameters(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters without those of any adapter or memory, under the names of the plain model.

    Tied ones come under each of their names.

    Args:
        model: with or without adapters.
        prefix: of the names.
    """
    if isinstance(wrapped := getattr(model, PEFT_BASE, None), nn.Module):
        yield from base_parameters(wrapped, prefix)
    elif isinstance(model, BaseAttentionAdapter):
        yield from base_parameters(model.base_attention, prefix)
    else:
        for name, parameter in model.named_parameters(recurse=False):
            yield f"{prefix}{name}", parameter
        for name, child in model.named_children():
            if name not in _own_children(model):
                yield from base_parameters(child, f"{prefix}{name}.")


def adapter_parts(model: nn.Module) -> tuple[str, ...]:
    """How paths of modules begin that attention adapters and In-Place TTT added to the base."""
    return tuple(
        f"{path}.{name}."
        for path, module in model.named_modules()
        for name in _own_children(module)
    )


def _own_children(module: nn.Module) -> list[str]:
    """Names of the parts of an adapter, or of a layer with memory, that are not the base's."""
    names = [name for name, _ in module.named_children()]
    if isinstance(module, BaseAttentionAdapter):
        return [name for name in names if name != BASE]
    if isinstance(module, InPlaceMLP):
        return [name for name in names if name == "ttt"]
    own = {"memory"} if hasattr(module, "memory_slot") else set()
    own |= {"memory_banks"} if hasattr(module, "memory_options") else set()
    return [name for name in names if name in own]


def base_fingerprint(model: nn.Module) -> str | None:
    """Fingerprint of the base; None where weights are not loaded (on `meta`).

    Files of adapters and memories, checkpoints and exports all name their base by it.
    """
    parameters = dict(sorted(base_parameters(model)))
    if any(parameter.is_meta for parameter in parameters.values()):
        return None
    return fingerprint(parameters.items())
