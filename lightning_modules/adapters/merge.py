"""Fold adapters into the weights of the base, where that is exact, and take them out again."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_modules.adapters.base import BASE, BaseAttentionAdapter


def merge_adapters(model: nn.Module) -> list[str]:
    """Make the base compute what base and adapters compute together.

    Exact for `noop` (there is nothing to do), composites of such, and peft's LoRA of linear
    layers (`W + scaling B A`, by peft's own `merge`). Either everything is merged or nothing.

    Args:
        model: has attention adapters, layers with peft's LoRA, or both.

    Returns:
        The paths that were merged.

    Raises:
        ValueError: something cannot be merged exactly (the message says why), is merged already,
            or there is nothing to merge.
    """
    sites, layers = _sites(model), _lora_layers(model)
    everything = {**sites, **layers}
    if not everything:
        raise ValueError("nothing to merge: the model has neither adapters nor LoRA layers of peft")
    for path, module in everything.items():
        if module.merged:
            raise ValueError(f"{path} is merged already: call unmerge_adapters first")
    for path, module in everything.items():
        site = path in sites
        obstacle = module.merge_obstacle() if site else _peft_obstacle(module, model)
        if obstacle is not None:
            raise ValueError(f"{path} cannot be merged exactly: {obstacle}. Nothing was merged")
    for site in sites.values():
        site.merged = True
    for layer in layers.values():
        layer.merge()
    return list(everything)


def unmerge_adapters(model: nn.Module) -> list[str]:
    """Undo `merge_adapters`: peft subtracts what it had added.

    The weights are those of before up to rounding in their own dtype: about 1e-7 of the larger of
    weight and update in float32, but 2^-8 (0.4 %) in bfloat16. Keep a copy of bfloat16 weights that
    must come back exactly.

    Returns:
        The paths that were unmerged.

    Raises:
        ValueError: something is not merged; nothing is changed.
    """
    sites, layers = _sites(model), _lora_layers(model)
    everything = {**sites, **layers}
    for path, module in everything.items():
        if not module.merged:
            raise ValueError(f"{path} is not merged: call merge_adapters first")
    if not everything:
        raise ValueError("nothing to unmerge: the model has neither adapters nor LoRA layers")
    for site in sites.values():
        site.merged = False
    for layer in layers.values():
        layer.unmerge()
    return list(everything)


def _sites(model: nn.Module) -> dict[str, Any]:
    """Adapters that own an attention module, by path."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, BaseAttentionAdapter) and BASE in module._modules
    }


def _lora_layers(model: nn.Module) -> dict[str, Any]:
    """Layers into which peft has put an adapter that is active there, by path."""
    from peft.tuners.tuners_utils import BaseTunerLayer  # slow to import, and seldom needed

    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and _has_active(module)
    }


def _has_active(layer: Any) -> bool:
    owned = [getattr(layer, name) for name in layer.adapter_layer_names]
    return any(name in adapters for adapters in owned for name in layer.active_adapters)


def _peft_obstacle(layer: Any, model: nn.Module) -> str | None:
    """Why a layer of peft cannot be merged exactly; None if it can."""
    from peft.tuners import lora
    from peft.tuners.lora.variants import DoraLinearVariant

    base = layer.get_base_layer()
    if not isinstance(layer, lora.Linear) or not isinstance(base, nn.Linear):
        return (
            f"it is peft's {type(layer).__name__} of a {type(base).__name__}, and only LoRA of "
            "nn.Linear is merged here: merge it by peft's own methods first"
        )
    active = layer.active_adapters
    variants = [layer.lora_variant[name] for name in active if name in layer.lora_variant]
    other = [v for v in variants if not isinstance(v, DoraLinearVariant)]
    if other:
        return (
            f"it has peft's {type(other[0]).__name__}, and only LoRA and DoRA are merged here: "
            "merge it by peft's own methods first, if it can be"
        )
    if layer.disable_adapters:
        return "peft's adapters are disabled there, so that merging would switch them on"
    if base.bias is None and any(layer.lora_bias.get(name) for name in active):
        return "lora_bias needs a bias in the base layer, which has none"
    owners = [m for m in model.modules() if any(p is base.weight for p in m._parameters.values())]
    if len(owners) > 1:
        names = ", ".join(type(owner).__name__ for owner in owners)
        return f"its weight is shared ({names}), so that merging would change the others, too"
    return None
