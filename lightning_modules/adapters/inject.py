"""Put adapters around the attention modules of a model, and take them away again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from lightning_modules.adapters.base import BASE, BaseAttentionAdapter, check_attention
from lightning_modules.adapters.registry import create_attention_adapter
from lightning_modules.adapters.token_mask import pass_token_masks, remove_token_masks
from lightning_modules.layers.deep_context import looks_into_context

ATTENTION_NAME = "self_attn"
Pattern = int | list[int] | str


@dataclass(frozen=True)
class AdapterSpec:
    """One line of a plan: which layers get which adapter.

    Args:
        pattern: module paths as a shell pattern (`*`, `layers.[02].self_attn`), a layer index, or
            a list of layer indices.
        adapter_type: registered name: `ttt`, `lora`, `noop`, `parallel`, `series`, `switch`,
            `routed`.
        adapter_config: its options, e.g. `{rank: 8}`; those that combine others take
            `{members: {name: {adapter_type: ..., adapter_config: ...}}}`.
    """

    pattern: Pattern
    adapter_type: str
    adapter_config: Any | None = None


def inject_adapters(
    model: nn.Module, plan: Iterable[AdapterSpec | tuple[Any, ...]]
) -> dict[str, BaseAttentionAdapter]:
    """Wrap attention modules (those called `self_attn`) as a plan says.

    Load the base weights first: adapters come after loading. They take the device, the dtype and
    the mode (train or eval) of the attention that they wrap. Either the whole plan is carried out
    or, on an error, nothing.

    A decoder that gets a 2D `attention_mask` hands it down to its adapters as `mask`, so that
    padding writes nothing; inject into the whole decoder, not into its layers, for that.

    Args:
        model: any model; Hugging Face decoders are.
        plan: specs, or tuples of their fields. Different layers may get different adapters.

    Returns:
        The adapters by module path, which is also their `slot`.

    Raises:
        ValueError: a pattern that matches nothing or is ambiguous, or a layer that would get two
            adapters.
        TypeError: a module that is not called as Hugging Face attention is.
    """
    attentions = {
        path: module
        for path, module in model.named_modules()
        if path.rsplit(".", 1)[-1] == ATTENTION_NAME
    }
    specs: dict[str, AdapterSpec] = {}
    for entry in plan:
        spec = entry if isinstance(entry, AdapterSpec) else AdapterSpec(*entry)
        for path in _matches(attentions, spec.pattern):
            if path in specs or isinstance(attentions[path], BaseAttentionAdapter):
                raise ValueError(
                    f"{path} would get two adapters (pattern {spec.pattern!r}): give every layer "
                    "one, or call remove_adapters first"
                )
            specs[path] = spec
    adapters = {path: _build(attentions[path], spec) for path, spec in specs.items()}
    for path, adapter in adapters.items():
        adapter.slot = path
        _replace(model, path, adapter)
    pass_token_masks(model, adapters)
    return adapters


def remove_adapters(model: nn.Module) -> list[str]:
    """Put the wrapped attention modules back, the same objects; returns their paths.

    What other parts of a layer (TTT-LoRA, In-Place TTT) learn from hooks on an adapter, they then
    learn from hooks on its attention.
    """
    adapters = [
        (path, module)
        for path, module in model.named_modules()
        if path.rsplit(".", 1)[-1] == ATTENTION_NAME and isinstance(module, BaseAttentionAdapter)
    ]
    for path, module in adapters:
        while isinstance(module, BaseAttentionAdapter):
            _hand_over_hooks(module, module.base_attention)
            module = module.base_attention
        _replace(model, path, module)
    if not looks_into_context(model):
        remove_token_masks(model)
    return [path for path, _ in adapters]


def parameter_group(model: nn.Module, name: str) -> str | None:
    """What an adapter says of its parameter; None for parameters of the base.

    Args:
        model: has the parameter.
        name: dotted name of the parameter in the model.
    """
    module, owner, inner = model, None, ""
    parts = name.split(".")
    for depth, part in enumerate(parts):
        if part == BASE and isinstance(module, BaseAttentionAdapter):
            owner = None
        elif owner is None and isinstance(module, BaseAttentionAdapter):
            owner, inner = module, ".".join(parts[depth:])
        module = getattr(module, part)
    return None if owner is None else owner.parameter_group(inner)


def base_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """State dict of the model without its adapters, under the names of the plain model."""
    state = model.state_dict()
    for path, module in reversed(list(model.named_modules())):  # inner adapters first
        if isinstance(module, BaseAttentionAdapter):
            state = _unwrap_keys(state, f"{path}." if path else "")
    return state


def _unwrap_keys(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Drop the keys of the adapter at `prefix`, and rename those of its base."""
    inner = f"{prefix}{BASE}."
    return {
        prefix + key.removeprefix(inner) if key.startswith(inner) else key: value
        for key, value in state.items()
        if key.startswith(inner) or not key.startswith(prefix)
    }


def _matches(attentions: dict[str, nn.Module], pattern: Pattern) -> list[str]:
    if isinstance(pattern, str):
        found = [path for path in attentions if fnmatchcase(path, pattern)]
        if not found:
            raise _no_match(attentions, pattern)
        return found
    indices = [pattern] if isinstance(pattern, int) else list(pattern)
    return [_layer(attentions, index) for index in indices]


def _layer(attentions: dict[str, nn.Module], index: int) -> str:
    found = [
        path for path, module in attentions.items() if getattr(module, "layer_idx", None) == index
    ]
    if not found:
        raise _no_match(attentions, index)
    if len(found) > 1:
        raise ValueError(
            f"layer {index} exists more than once ({', '.join(found)}): give a pattern of module "
            "paths, or inject into one part of the model"
        )
    return found[0]


def _no_match(attentions: dict[str, nn.Module], pattern: str | int) -> ValueError:
    known = ", ".join(attentions) or f"none: the model has no module called {ATTENTION_NAME}"
    return ValueError(f"pattern {pattern!r} matches no attention module; there are: {known}")


def _build(attention: nn.Module, spec: AdapterSpec) -> BaseAttentionAdapter:
    check_attention(attention)
    adapter = create_attention_adapter(attention, spec.adapter_type, spec.adapter_config)
    for parameter in attention.parameters():
        if parameter.is_floating_point():
            adapter.to(device=parameter.device, dtype=parameter.dtype)
            break
    return adapter.train(attention.training)


def _hand_over_hooks(adapter: nn.Module, attention: nn.Module) -> None:
    for key, hook in adapter._forward_pre_hooks.items():
        with_kwargs = key in adapter._forward_pre_hooks_with_kwargs
        attention.register_forward_pre_hook(hook, with_kwargs=with_kwargs)


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
