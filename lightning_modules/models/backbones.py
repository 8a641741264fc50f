"""The backbones of the action expert by name, and their options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal, NamedTuple

from lightning_modules.models.action_expert import ExpertConfig
from lightning_modules.models.backbone import BackboneOptions
from lightning_modules.models.pi0_options import PI0Options


class _Entry(NamedTuple):
    argument: str
    options: type[BackboneOptions]


_BACKBONES = {"state": _Entry("expert", ExpertConfig), "pi0": _Entry("pi0", PI0Options)}
"""Name -> argument of `ActionExpertModule` that holds the options, and their class."""


def choose_backbone(name: str, **arguments: BackboneOptions | None) -> BackboneOptions:
    """Options of the backbone called `name`, or their defaults.

    Args:
        name: `state` or `pi0`.
        **arguments: options by argument of `ActionExpertModule`; None where none were given.

    Raises:
        ValueError: no such backbone, or options of another one.
    """
    if name not in _BACKBONES:
        raise ValueError(f"unknown backbone {name!r}; choose one of {', '.join(_BACKBONES)}")
    for other, (argument, _) in _BACKBONES.items():
        if other != name and arguments[argument] is not None:
            raise ValueError(
                f"backbone: {name} does not read the options of {argument!r}; remove them, or set "
                f"backbone: {other}"
            )
    argument, options = _BACKBONES[name]
    return arguments[argument] or options()


def store_backbone(options: BackboneOptions) -> dict[str, Any]:
    """Arguments of `ActionExpertModule` as plain values, for a checkpoint."""
    for name, (argument, options_class) in _BACKBONES.items():
        if isinstance(options, options_class):
            return {"backbone": name, argument: asdict(options)}  # type: ignore[call-overload]
    raise ValueError(f"{type(options).__name__} are not the options of a known backbone")


def restore_backbone(stored: Mapping[str, Any], pretrained: str | None = None) -> dict[str, Any]:
    """Inverse of `store_backbone`; further arguments stay. Older checkpoints name no backbone.

    Args:
        stored: arguments of `ActionExpertModule`.
        pretrained: takes the place of the stored `pretrained`.

    Raises:
        ValueError: `pretrained` for a model that was trained from scratch.
    """
    arguments = {"backbone": "state", **stored}
    argument, options = _BACKBONES[arguments["backbone"]]
    values = dict(arguments[argument])
    if pretrained is not None:
        if values.get("pretrained") is None:
            raise ValueError("pretrained was given, but the checkpoint has all of its weights")
        values["pretrained"] = pretrained
    arguments[argument] = options.restore(values)
    return arguments


def layer_positions(
    positions: Literal["all"] | list[int] | None, options: BackboneOptions
) -> tuple[int, ...]:
    """Indices of the decoder layers that `positions` stands for; None for none.

    Raises:
        ValueError: an index that the decoder does not have.
    """
    if positions is None:
        return ()
    depth = options.num_layers
    if positions == "all":
        return tuple(range(depth))
    outside = [index for index in positions if not 0 <= index < depth]
    if outside:
        raise ValueError(
            f"ttt_layer_positions has {outside[0]}, but the expert's {depth} layers are "
            f"0 to {depth - 1}"
        )
    return tuple(sorted(set(positions)))
