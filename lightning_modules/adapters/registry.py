"""Adapters by name, and their options from plain dictionaries."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from types import UnionType
from typing import Any, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from torch import nn

from lightning_modules.adapters.base import BaseAttentionAdapter

AdapterClass = TypeVar("AdapterClass", bound=type[BaseAttentionAdapter])
ConfigT = TypeVar("ConfigT")


class RegisteredAdapter(NamedTuple):
    """An adapter and the dataclass of its options."""

    adapter_class: type[BaseAttentionAdapter]
    config_class: type


_ADAPTERS: dict[str, RegisteredAdapter] = {}


def register_attention_adapter(
    name: str, config_class: type
) -> Callable[[AdapterClass], AdapterClass]:
    """Class decorator: make an adapter known as `name`.

    Args:
        name: the `adapter_type` of plans and configurations.
        config_class: dataclass of its options; the adapter is built as
            `adapter_class(base_attention, config)`.

    Raises:
        ValueError: the name is taken by another class.
    """

    def register(adapter_class: AdapterClass) -> AdapterClass:
        known = _ADAPTERS.get(name)
        if known is not None and known.adapter_class.__qualname__ != adapter_class.__qualname__:
            raise ValueError(
                f"adapter {name!r} is already {known.adapter_class.__qualname__}: "
                f"register {adapter_class.__qualname__} under another name"
            )
        _ADAPTERS[name] = RegisteredAdapter(adapter_class, config_class)
        return adapter_class

    return register


def registered_adapters() -> dict[str, RegisteredAdapter]:
    """Every adapter by name, also those of others who have registered some."""
    return dict(_ADAPTERS)


def create_attention_adapter(
    base_attention: nn.Module, adapter_type: str, adapter_config: Any | None = None
) -> BaseAttentionAdapter:
    """Wrap an attention module.

    Args:
        base_attention: module to wrap.
        adapter_type: registered name, e.g. `ttt`.
        adapter_config: options as a dict (nested where the dataclass is) or as the adapter's own
            dataclass; None takes the defaults.

    Raises:
        ValueError: unknown type or option, or options of another adapter.
    """
    config = adapter_options(adapter_type, adapter_config)
    return _ADAPTERS[adapter_type].adapter_class(base_attention, config)


def adapter_options(adapter_type: str, adapter_config: Any | None = None) -> Any:
    """Options of an adapter as its dataclass; arguments and errors as `create_attention_adapter`.

    Options of members of a composite stay as they are.
    """
    if adapter_type not in _ADAPTERS:
        close = get_close_matches(str(adapter_type), _ADAPTERS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        known = ", ".join(sorted(_ADAPTERS))
        raise ValueError(f"unknown adapter type {adapter_type!r}; known types are {known}{hint}")
    return as_config(_ADAPTERS[adapter_type].config_class, adapter_config, adapter_type)


def as_config(config_class: type[ConfigT], options: Any, where: str) -> ConfigT:
    """Options as a dataclass.

    Args:
        config_class: the dataclass.
        options: a mapping (nested where the dataclass is), e.g. of a yaml or a checkpoint; the
            dataclass itself; or None for the defaults.
        where: what the options belong to, for messages.

    Raises:
        ValueError: an option that is unknown (the closest known one is named) or missing, or
            options of another kind.
    """
    if isinstance(options, config_class):
        return options
    if options is None:
        options = {}
    if not isinstance(options, Mapping):
        raise ValueError(
            f"{where}: options are a {type(options).__name__}; "
            f"expected a dict or a {config_class.__name__}"
        )
    check_names(config_class, options, where)
    types = get_type_hints(config_class)
    values = {}
    for name, value in options.items():
        nested = _dataclass_in(types[name])
        optional = value is None and nested is not types[name]
        plain = nested is None or optional
        values[name] = value if plain else as_config(nested, value, f"{where}.{name}")
    return config_class(**values)


def _dataclass_in(annotation: Any) -> Any:
    """The dataclass that an option is, or may be (`Options | None`); None if it is none."""
    options = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else [annotation]
    return next((option for option in options if is_dataclass(option)), None)


def check_names(config_class: type, options: Mapping[str, Any], where: str) -> None:
    """Raise ValueError if options are not those of a dataclass, or one without default is missing.

    Arguments are those of `as_config`; the message names the closest option that exists.
    """
    known = {field.name: field for field in fields(config_class)}
    for name in options:
        if name not in known:
            close = get_close_matches(str(name), known, n=1, cutoff=0.0)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ValueError(
                f"{where}: unknown option {name!r}; {hint}Options are {', '.join(known) or 'none'}"
            )
    for name, field in known.items():
        has_default = field.default is not MISSING or field.default_factory is not MISSING
        if name not in options and not has_default:
            raise ValueError(f"{where}: the option {name!r} is missing")
