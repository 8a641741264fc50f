"""What of a model is its base: where TTT-LoRA goes, and which weights its files belong to."""

from __future__ import annotations

from collections.abc import Iterator

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lightning_modules.adapters.base import BASE, BaseAttentionAdapter
from lightning_modules.adapters.ttt_lora.config import TTTLoraConfig
from lightning_modules.layers.in_place_mlp import InPlaceMLP
from lightning_modules.models.frozen import fingerprint


def base_parameters(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters without those of any adapter, under the names of the plain model.

    Tied ones come under each of their names.

    Args:
        model: with or without adapters.
        prefix: of the names.
    """
    if isinstance(model, BaseTunerLayer):
        yield from base_parameters(model.base_layer, prefix)
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
    """Names of the parts of an adapter that are not what it wraps."""
    names = [name for name, _ in module.named_children()]
    if isinstance(module, BaseAttentionAdapter):
        return [name for name in names if name != BASE]
    return [name for name in names if name == "ttt"] if isinstance(module, InPlaceMLP) else []


def base_fingerprint(model: nn.Module) -> str | None:
    """Fingerprint of the base; None where weights are not loaded (on `meta`)."""
    parameters = dict(sorted(base_parameters(model)))
    if any(parameter.is_meta for parameter in parameters.values()):
        return None
    return fingerprint(parameters.items())


def check_base(config: TTTLoraConfig, model: nn.Module) -> None:
    """Note in an adapter's config which base it belongs to.

    Raises:
        ValueError: it belongs to another one.
    """
    found = base_fingerprint(model)
    if config.base_fingerprint is None:
        config.base_fingerprint = found
    elif found not in (None, config.base_fingerprint):
        raise ValueError(
            f"the adapter was trained on other weights (base_fingerprint "
            f"{config.base_fingerprint}) than this {type(model).__name__} has ({found}): load the "
            "base that it belongs to; to load it anyway, set base_fingerprint to null in its "
            "adapter_config.json"
        )
