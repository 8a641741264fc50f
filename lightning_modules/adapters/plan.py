"""Plans of a decoder's adapters before there is a decoder: checked, completed, as plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from fnmatch import fnmatchcase
from typing import Any

from lightning_modules.adapters.compose import MemberSpec
from lightning_modules.adapters.inject import ATTENTION_NAME, AdapterSpec, Pattern
from lightning_modules.adapters.registry import adapter_options, as_config


def complete_spec(spec: AdapterSpec, cond_size: int | None = None) -> AdapterSpec:
    """The same line with its options as dataclasses; see `complete_options`."""
    options = complete_options(spec.adapter_type, spec.adapter_config, cond_size)
    return replace(spec, adapter_config=options)


def complete_options(
    adapter_type: str, adapter_config: Any | None = None, cond_size: int | None = None
) -> Any:
    """Options as the adapter's dataclass, those of members (at any depth) included.

    Args:
        adapter_type: registered name.
        adapter_config: as `create_attention_adapter` takes it.
        cond_size: size of the timestep condition. It is filled in wherever gate or norm of a TTT
            adapter read the condition and its size was left open.

    Raises:
        ValueError: an unknown type or option (the closest one is named), or a size of the
            condition that is not the model's. The message names the member.
    """
    config = adapter_options(adapter_type, adapter_config)
    members = getattr(config, "members", None)
    if isinstance(members, Mapping):
        return replace(config, members={n: _member(n, m, cond_size) for n, m in members.items()})
    if cond_size is None or not getattr(config, "needs_condition", False):
        return config
    if config.cond_size not in (None, cond_size):
        raise ValueError(
            f"{adapter_type}: cond_size={config.cond_size}, but the model's condition has "
            f"{cond_size} channels: leave cond_size out"
        )
    return replace(config, cond_size=cond_size)


def _member(name: str, spec: MemberSpec, cond_size: int | None) -> MemberSpec:
    try:
        options = complete_options(spec.adapter_type, spec.adapter_config, cond_size)
    except ValueError as error:
        raise ValueError(f"member {name!r}: {error}") from error
    return MemberSpec(spec.adapter_type, options)


def read_plan(lines: Sequence[AdapterSpec | Mapping[str, Any]] | None) -> tuple[AdapterSpec, ...]:
    """The lines of an option `adapters`, checked as far as they can be without a model.

    Raises:
        ValueError: a wrong line; the message names it.
    """
    specs = []
    for number, line in enumerate(lines or ()):
        try:
            specs.append(complete_spec(as_config(AdapterSpec, line, "line")))
        except (TypeError, ValueError) as error:
            raise ValueError(f"adapters[{number}]: {error}") from error
    return tuple(specs)


def store_plan(plan: Sequence[AdapterSpec]) -> list[dict[str, Any]]:
    """Lines as plain values, for a checkpoint; `read_plan` reads them again."""
    return [asdict(spec) for spec in plan]


def lay_out(lines: Mapping[str, AdapterSpec], depth: int) -> list[AdapterSpec]:
    """One line per layer that gets an adapter, its pattern the path of the layer's attention.

    Args:
        lines: lines of the plan by the name that a message gives them, e.g. `adapters[0]`.
        depth: layers of the decoder; their attention is called `layers.<index>.self_attn`.

    Raises:
        ValueError: a pattern that fits no layer, or a layer that would get two adapters.
    """
    paths = [f"layers.{index}.{ATTENTION_NAME}" for index in range(depth)]
    plan: dict[int, AdapterSpec] = {}
    source: dict[int, str] = {}
    for name, spec in lines.items():
        for index in _layers(name, spec.pattern, paths):
            if index in plan:
                raise ValueError(
                    f"layer {index} would get two adapters, from {source[index]} and from {name} "
                    f"(pattern {spec.pattern!r}): take it out of one of them, or combine both in "
                    "one line of adapter_type parallel, series, switch or routed"
                )
            plan[index], source[index] = replace(spec, pattern=paths[index]), name
    return [plan[index] for index in sorted(plan)]


def _layers(name: str, pattern: Pattern, paths: list[str]) -> list[int]:
    """Indices that a pattern stands for."""
    depth = len(paths)
    if isinstance(pattern, str):
        found = [index for index, path in enumerate(paths) if fnmatchcase(path, pattern)]
        if not found:
            raise ValueError(
                f"{name}: pattern {pattern!r} fits no layer; there are {paths[0]} to {paths[-1]}, "
                "and * fits all"
            )
        return found
    indices = [pattern] if isinstance(pattern, int) else list(pattern)
    outside = [index for index in indices if not 0 <= index < depth]
    if outside or not indices:
        what = f"layer {outside[0]} is not there" if outside else "no layer is given"
        raise ValueError(f"{name}: {what}; the decoder's {depth} layers are 0 to {depth - 1}")
    return list(dict.fromkeys(indices))
